"""Sweeps: what runs, what is kept, what is refused, and what a failing run does to the others."""

import io
import math
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
from scipy import stats as scipy_stats

from workbench import records
from workbench.launcher import cli, recipe
from workbench.launcher.lineage import lineage_of
from workbench.launcher.recipe import RecipeError
from workbench.launcher.runner import StageError, check, run
from workbench.launcher.runs import Runs
from workbench.launcher.sweep import job
from workbench.launcher.terminal import format_resolved
from workbench.records.lock import locked

GRID = "grid: {job: sweep, run: {job: make}, over: {size: [1, 2], seed: [0, 1]}}\n"
NAMES = ["size-1_seed-0", "size-1_seed-1", "size-2_seed-0", "size-2_seed-1"]


def read(text: str, *overrides: tuple[str, str]) -> recipe.Recipe:
    Path("r.yaml").write_text(text)
    return recipe.read(Path("r.yaml"), overrides)


def execute(text: str = GRID, *overrides: tuple[str, str], replace: bool = False) -> list[dict[str, Any]]:
    return run(read(text, *overrides), Path("out"), replace)


def test_every_run_is_a_stage_of_its_own(plugin: Any) -> None:
    alone, grid = execute("alone: {job: make, size: 2, seed_everything: 1}\n" + GRID)
    assert plugin.calls == ["alone", *NAMES]
    assert [row["name"] for row in grid["runs"]] == NAMES
    for row in grid["runs"]:
        record = records.finished(Path("out/grid") / row["folder"])
        assert record is not None
        assert record["stage"] == f"grid/{row['name']}"
        assert record["metrics"] == row["metrics"] == {"test/loss": row["over"]["size"] + row["over"]["seed"] / 10}
        assert (row["fingerprint"], row["seconds"], row["monitor"]) == (record["fingerprint"], 1.5, ["loss", "min"])
        assert (row["status"], row["attempts"]) == ("finished", 1)
    assert grid["runs"][3]["fingerprint"] == alone["fingerprint"], "the same arguments are the same work"
    assert sorted(path.name for path in Path("out/grid/size-1_seed-0").iterdir()) == [
        "made.txt",
        "record.json",
        "tried",
    ]


def test_means_over_seeds_have_their_interval(plugin: Any) -> None:
    (grid,) = execute(GRID.replace("[0, 1]", "[0, 1, 5]"))
    assert [(row["over"], row["n"]) for row in grid["summary"]] == [({"size": 1}, 3), ({"size": 2}, 3)]
    for row in grid["summary"]:
        values = [row["over"]["size"] + seed / 10 for seed in (0, 1, 5)]
        mean = sum(values) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
        half = scipy_stats.t.ppf(0.975, 2) * deviation / math.sqrt(3)
        found = row["metrics"]["test/loss"]
        assert [found["mean"], found["deviation"]] == pytest.approx([mean, deviation])
        assert found["interval"] == pytest.approx({"low": mean - half, "high": mean + half, "confidence": 0.95})
    assert execute("other: {job: sweep, run: {job: make}, over: {size: [1]}}\n")[0]["summary"] == []


def test_what_is_finished_is_kept_when_the_grid_grows_or_shrinks(plugin: Any) -> None:
    text = GRID + "picked: {job: use, of: grid/size-2_seed-1}\n"
    before, picked = execute(text)
    assert picked["read"] == "2"
    plugin.calls.clear()
    after, again = execute(text.replace("[0, 1]", "[0, 1, 2]"))
    assert plugin.calls == ["size-1_seed-2", "size-2_seed-2"]
    assert [row["attempts"] for row in after["runs"]] == [0, 0, 1, 0, 0, 1]
    assert after["fingerprint"] != before["fingerprint"]
    assert {**again, "format": 0} == {**picked, "format": 0}, "it comes from one run, which is kept"
    plugin.calls.clear()
    assert execute(text)[0]["fingerprint"] == before["fingerprint"]
    assert execute(text.replace("job: sweep", "job: sweep, workers: 3, retries: 0"))[0]["status"] == "finished"
    assert plugin.calls == [], "where it runs is no other work"


def test_a_run_whose_folder_is_gone_is_run_again(plugin: Any) -> None:
    execute()
    Path("out/grid/size-2_seed-0").rename("elsewhere")
    plugin.calls.clear()
    execute()
    assert plugin.calls == ["size-2_seed-0"]


def test_a_failing_run_does_not_sink_the_others_and_is_tried_again(plugin: Any) -> None:
    text = "grid: {job: sweep, run: {job: make}, over: {mood: [bad, fine, once], seed: [0]}}\nlast: {job: make}\n"
    with pytest.raises(StageError) as caught:
        execute(text)
    said = "stage 'grid': 1 of 3 runs failed, the others are kept\n  grid/mood-bad_seed-0: ArithmeticError: as asked\n"
    assert str(caught.value).startswith(said)
    assert plugin.calls == ["mood-bad_seed-0"] * 2 + ["mood-fine_seed-0"] + ["mood-once_seed-0"] * 2
    record = records.read(Path("out/grid")) or {}
    assert record["status"] == "failed"
    told = [(row["status"], row["attempts"], row.get("error")) for row in record["runs"]]
    assert told == [("failed", 2, "ArithmeticError: as asked"), ("finished", 1, None), ("finished", 2, None)]
    assert [row["n"] for row in record["summary"]] == [1, 1]
    plugin.calls.clear()
    with pytest.raises(StageError):
        execute(text, ("grid.retries", "0"))
    assert plugin.calls == ["mood-bad_seed-0"]
    (records.read(Path("out/grid/mood-fine_seed-0")) or {})["status"] = "finished"
    plugin.calls.clear()
    assert execute(text.replace("bad, ", ""))[1]["status"] == "finished"
    assert plugin.calls == ["last"]


def test_a_stopped_sweep_goes_on(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(list[str]):
        def append(self, name: str) -> None:
            super().append(name)
            if len(self) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(plugin, "calls", Stop())
    with pytest.raises(KeyboardInterrupt):
        execute()
    assert (records.read(Path("out/grid")) or {})["status"] == "running"
    assert (records.read(Path("out/grid/size-1_seed-1")) or {})["status"] == "running"
    assert execute()[0]["status"] == "finished"
    assert plugin.calls == [NAMES[0], *NAMES[1:2] * 2, *NAMES[2:]]


def test_every_run_is_checked_before_the_first_stage(plugin: Any) -> None:
    text = "first: {job: make}\n" + GRID.replace("[1, 2]", "[1, much]")
    with pytest.raises(RecipeError) as caught:
        execute(text)
    assert str(caught.value) == "r.yaml, stage 'grid/size-much_seed-0', key 'size': is 'much': expected int"
    text = "first: {job: make}\n" + GRID.replace("job: make", "job: make, of: frist")
    with pytest.raises(RecipeError, match=r"stage 'grid/size-1_seed-0', key 'of'.*did you mean 'first'\?"):
        execute(text)
    assert plugin.calls == []
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid: {job: sweep, over: {seed: [0]}}", "key 'run': is required by job 'sweep' and not given"),
        ("grid: {job: sweep, run: {job: make}}", "key 'over': is required by job 'sweep' and not given"),
        ("grid: {job: sweep, run: make, over: {seed: [0]}}", "key 'run': is the stage to repeat: expected {job: fit"),
        ("grid: {job: sweep, run: {job: mke}, over: {seed: [0]}}", "key 'run.job': unknown job 'mke'; did you mean"),
        ("grid: {job: sweep, run: {job: make, sze: 1}, over: {seed: [0]}}", "key 'run.sze': job 'make' has no such"),
        ("grid: {job: sweep, run: {job: make, out: x}, over: {seed: [0]}}", "key 'run.out': the stage's folder is set"),
        ("grid: {job: sweep, run: {job: make}, over: {seed: 0}}", "key 'over': has seed: 0: give a list"),
        (
            "grid: {job: sweep, run: {job: make}, over: {sze: [0]}}",
            "key 'over.sze': job 'make' has no such argument; did you mean 'size'?",
        ),
        ("grid: {job: sweep, run: {job: make}, over: {size.x: [0]}}", "key 'size': is {x: 0}: expected int"),
        (
            "grid: {job: sweep, run: {job: make, size: 1}, over: {size.x: [0]}}",
            "key 'over.size.x': size is 1, which has no keys",
        ),
        ("grid: {job: sweep, run: {job: make}, over: {out: [a]}}", "key 'over.out': job 'make' has no such argument"),
        (
            "grid: {job: sweep, run: {job: sweep, run: {job: make}, over: {seed: [0]}}, over: {seed: [0]}}",
            "key 'run.job': job 'sweep' cannot be repeated, a sweep in a sweep",
        ),
        ("grid: {job: sweep, run: {job: report}, over: {title: [a]}}", "job 'report' cannot be repeated, it looks at"),
        ("grid: {job: sweep, run: {job: make}, over: {seed: [0]}, wrkers: 2}", "'wrkers': job 'sweep' has no such"),
        ("grid: {job: sweep, run: {job: make}, over: {seed: [0]}, workers: two}", "'workers': is 'two': expected int"),
        ("grid: {job: sweep, run: {job: make}, over: {seed: [0]}, ray: {cpu: 1}}", "Ray has no such argument; did you"),
        ("grid: {job: sweep, run: {job: make}, over: {seed: [0]}, ray: {cpus: -1}}", "'ray': cpus is -1.0: give a"),
    ],
)  # fmt: skip
def test_mistakes_are_said(plugin: Any, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        execute(text + "\n")
    assert str(caught.value).startswith("r.yaml, stage 'grid")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [("workers: 0", "workers is 0"), ("retries: -1", "retries -1"), ("workers: 2, ray: {}", "beside ray")],
)
def test_contradictions_are_said(plugin: Any, given: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.launcher.sweep.on_ray.find_spec", lambda _: True)  # Ray is there or not
    with pytest.raises(RecipeError, match=f"stage 'grid': .*{said}"):
        execute("first: {job: make}\n" + GRID.replace("job: sweep", f"job: sweep, {given}"))
    assert plugin.calls == []


def test_without_ray_a_sweep_on_it_is_refused_before_anything_runs(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.launcher.sweep.on_ray.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"'ray': ray is not installed: pip install 'distill-prune\[ray\]'"):
        execute("first: {job: make}\n" + GRID.replace("job: sweep", "job: sweep, ray: {}"))
    assert plugin.calls == []


def test_other_stages_name_a_run_by_a_slash(plugin: Any) -> None:
    text = (
        "first: {job: make, size: 7}\ngrid: {job: sweep, run: {job: use, of: first}, over: {others: [[], [first]]}}\n"
    )
    (first, grid) = execute(text)
    (run_a, run_b) = (records.read(Path("out/grid") / row["name"]) or {} for row in grid["runs"])
    assert run_a["read"] == run_b["read"] == "7"
    parent = {"stage": "first", "fingerprint": first["fingerprint"]}
    assert (run_a["parents"], run_b["parents"]) == ({"of": parent}, {"of": parent, "others[0]": parent})
    assert grid["parents"] == {"of": parent, "others[0]": parent}
    for more, said in {
        "last: {job: use, of: grid}": "stage 'grid' is a sweep: name one of grid/size-1_seed-0, grid/size-1_seed-1",
        "last: {job: use, of: grid/size-1_seed-7}": "stage 'grid' has no 'size-1_seed-7'; did you mean 'grid/size-1_s",
        "last: {job: use, of: gird/size-1_seed-0}": "neither a stage above nor a folder; did you mean 'grid/size-1_s",
    }.items():
        with pytest.raises(RecipeError) as caught:
            execute(GRID + more + "\n")
        assert said in str(caught.value)
    with pytest.raises(RecipeError, match="stage 'grid' is named before it exists: move it above 'early'"):
        execute("early: {job: use, of: grid/size-1_seed-0}\n" + GRID)
    with pytest.raises(RecipeError, match="stage 'grid/size-2_seed-0', key 'of': the stage names itself"):
        execute(GRID.replace("[1, 2]", "[2]").replace("make", "make, of: grid/size-2_seed-1"))
    with pytest.raises(RecipeError, match="in a cycle: first -> grid -> first"):
        execute(
            "first: {job: use, of: grid/seed-0}\ngrid: {job: sweep, run: {job: make, of: first}, over: {seed: [0]}}"
        )


def test_where_several_stages_are_asked_for_a_sweep_is_all_of_its_runs(plugin: Any) -> None:
    text = GRID + "last: {job: use, of: grid/size-1_seed-0, others: [grid]}\n"
    last = execute(text)[1]
    grid = records.read(Path("out/grid")) or {}
    assert last["parents"]["others[0]"] == {"stage": "grid", "fingerprint": grid["fingerprint"]}
    with pytest.raises(RecipeError, match="last holds a finished stage made with another 'grid' as others"):
        execute(text.replace("[0, 1]", "[0, 1, 2]"))


def test_a_run_made_with_other_arguments_is_refused_or_moved_aside(plugin: Any) -> None:
    execute(GRID.replace("over: {size: [1, 2], ", "over: {mood: [fine], "))
    plugin.calls.clear()
    text = GRID.replace("over: {size: [1, 2], ", "over: {mood: [fine], ").replace("make}", "make, size: 3}")
    with pytest.raises(RecipeError, match=r"stage 'grid/mood-fine_seed-0': .* made with size 1 instead of 3: choose"):
        execute(text)
    execute(text, replace=True)
    assert Path("out/replaced/grid/mood-fine_seed-0-1/made.txt").read_text() == "1"
    assert Path("out/grid/mood-fine_seed-0/made.txt").read_text() == "3"
    with pytest.raises(RecipeError, match="grid holds a finished stage made with job sweep instead of make"):
        execute("grid: {job: make}\n")
    execute("grid: {job: make}\n", replace=True)
    assert Path("out/replaced/grid-1/mood-fine_seed-0/made.txt").exists()
    with pytest.raises(RecipeError, match="made with job make instead of sweep"):
        execute()
    assert execute(replace=True)[0]["status"] == "finished"


def test_runs_take_what_stages_share(plugin: Any) -> None:
    Path("body.yaml").write_text("job: make\nmood: fine\n")
    text = "size: 5\nseed_everything: 9\nretries: 0\ngrid: {job: sweep, run: body.yaml, over: {mood: [fine, once]}}\n"
    (stage,) = read(text).stages
    assert stage.arguments["retries"] == 0
    assert stage.arguments["run"] == {"job": "make", "mood": "fine", "size": 5, "seed_everything": 9}
    assert [each.arguments["mood"] for each in stage.runs] == ["fine", "once"]
    assert all(each.arguments["size"] == 5 for each in stage.runs)
    (stage,) = read(text, ("grid.run.size", "6"), ("grid.over.seed", "[1]")).stages
    assert [each.name for each in stage.runs] == ["grid/mood-fine_seed-1", "grid/mood-once_seed-1"]
    assert [(each.arguments["size"], each.arguments["seed_everything"]) for each in stage.runs] == [(6, 1)] * 2


MODEL = "{class_path: workbench.models.MLP, init_args: {in_features: 64, hidden: [4], classes: 10}}"
FIT = f"""
model: {MODEL}
data: {{class_path: workbench.data.Digits, init_args: {{batch_size: 512}}}}
trainer: {{max_epochs: 2, accelerator: cpu, limit_test_batches: 1, limit_val_batches: 1}}
grid:
  job: sweep
  run: {{job: fit}}
  over: {{model.init_args.activation: [relu, gelu], seed: [3]}}
"""


def test_keys_reach_into_classes_and_leave_what_is_shared_alone(plugin: Any) -> None:
    (stage,) = read(FIT + "  retries: 0\n", ("grid.run.model.init_args.hidden", "[5]")).stages
    found = [each.arguments["model"]["init_args"] for each in stage.runs]
    assert [(each["activation"], each["hidden"]) for each in found] == [("relu", [5]), ("gelu", [5])]
    assert "activation" not in stage.arguments["run"]["model"]["init_args"]
    assert [each.arguments["seed_everything"] for each in stage.runs] == [3, 3]
    hunts = FIT.replace("job: fit", "job: hunt, levels: 1").replace(
        "{model.init_args.activation: [relu, gelu], seed: [3]}", "{start: [grid]}"
    )
    assert set(read(hunts).stages[0].runs[0].arguments) == {"levels", "start"}, "it has the model of its start"
    Path("wide.yaml").write_text("class_path: workbench.models.MLP\ninit_args: {hidden: [9]}\n")
    (stage,) = read(FIT.replace("model.init_args.activation: [relu, gelu]", "model: [wide.yaml]")).stages
    assert stage.runs[0].arguments["model"]["init_args"] == {"hidden": [9]}
    assert stage.runs[0].over == {"model": "wide.yaml", "seed": 3}


def test_the_printed_recipe_is_the_same_recipe(plugin: Any) -> None:
    plan = check(read(FIT + "picked: {job: export, of: grid/activation-relu_seed-3}\n"))
    text = format_resolved(read(FIT), plan)
    assert "activation: [relu, gelu]" in " ".join(text.split()).replace("- relu - gelu", "[relu, gelu]")
    again = check(read(text))
    assert {n: p for n, (p, _) in lineage_of(again).items()} == {n: p for n, (p, _) in lineage_of(plan).items()}


def test_a_run_folder_in_use_is_a_failure_of_that_run_alone(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.launcher.sweep import task

    def busy(folder: Path) -> Any:
        if folder.name == NAMES[1]:
            raise ValueError(f"{folder} is in use by process 7")
        return locked(folder)

    monkeypatch.setattr(task, "locked", busy)
    with pytest.raises(StageError, match=r"1 of 4 runs failed.*\n  grid/size-1_seed-1: .* in use by process 7"):
        execute()
    assert plugin.calls == [NAMES[0], *NAMES[2:]]


def test_two_processes_on_one_folder_is_a_mistake_on_the_command_line(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import workbench.launcher.runner

    def busy(folder: Path) -> Any:
        raise ValueError(f"{folder} is in use by process 7 on here")

    read(GRID)
    monkeypatch.setattr(workbench.launcher.runner, "locked", busy)
    with pytest.raises(SystemExit) as caught:
        cli.main("lightning", ["run", "r.yaml", "--out", "out"])
    assert (caught.value.code, capsys.readouterr().err) == (2, "error: out is in use by process 7 on here\n")
    for flag in ("--print", "--help"):
        with pytest.raises(SystemExit) as caught:
            cli.main("lightning", ["run", "r.yaml", flag])
        assert caught.value.code == 0
    assert plugin.calls == []


def test_one_line_for_every_run(plugin: Any) -> None:
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(StageError):
        execute("grid: {job: sweep, run: {job: make}, over: {mood: [fine, once, bad]}}\n")
    fine, once, bad, grid = said.getvalue().splitlines()
    assert fine == "grid/mood-fine  1.5 s  test loss 1"
    assert once == "grid/mood-once  1.5 s  test loss 1  after 2 attempts"
    assert bad == "grid/mood-bad  failed  after 2 attempts  ArithmeticError: as asked"
    assert grid.startswith("grid    failed after ")


@pytest.mark.parametrize(
    ("trainer", "gpus", "several"),
    [
        ("{}", 0, False),
        ("{}", 2, True),
        ("{accelerator: cpu}", 2, False),
        ("{devices: 1}", 2, False),
        ("{devices: [1]}", 2, False),
        ("{devices: '1'}", 2, False),
        ("{devices: 2, accelerator: cpu}", 0, True),
        ("{devices: [0, 1]}", 2, True),
        ("{devices: -1}", 2, True),
        ("{num_nodes: 2, devices: 1}", 0, True),
    ],
)
def test_a_run_over_several_devices_has_a_process_of_its_own(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, trainer: str, gpus: int, several: bool
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    text = FIT.replace("accelerator: cpu, ", "").replace("job: fit", f"job: fit, trainer: {trainer}")
    plan = check(read(text))
    runs = Runs(plan[0].runs, Path("out"), lineage_of(plan))
    assert job._uses_several_devices(runs, runs.plan[0]) is several


def test_devices_are_inherited_too(plugin: Any) -> None:
    grid = "grid: {job: sweep, run: {job: hunt, levels: 1, start: teacher}, over: {seed: [0]}}\n"
    for devices in (1, 2):
        trainer = f"trainer: {{max_epochs: 1, accelerator: cpu, devices: {devices}}}"
        data = "data: {class_path: workbench.data.Digits}"
        plan = check(read(f"teacher: {{job: fit, model: {MODEL}, {data}, {trainer}}}\n{grid}"))
        records.write(Path("out/teacher"), {"status": "finished", "arguments": plan[0].resolved()})
        runs = Runs(plan[1].runs, Path("out"), lineage_of(plan))
        assert job._uses_several_devices(runs, runs.plan[0]) is (devices == 2)
