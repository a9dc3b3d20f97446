"""The command line: what it does, and what it says to every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributions import write_metadata
from workbench.launcher import cli, recipe
from workbench.launcher.cli import Options
from workbench.launcher.recipe import RecipeError

MODEL = "{class_path: workbench.models.MLP, init_args: {in_features: 64, hidden: [4], classes: 10}}"
GOOD = f"""\
# A small one
data: {{class_path: workbench.data.Digits, init_args: {{batch_size: 512}}}}
trainer: {{max_steps: 2, accelerator: cpu}}
teacher: {{job: fit, model: {MODEL}}}
student: {{job: distill, teacher: teacher, model: {MODEL}}}
"""


def lightning(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Exit code, stdout, stderr of ``lightning run ARGUMENTS``."""
    with pytest.raises(SystemExit) as caught:
        cli.main("lightning", ["run", *arguments])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(GOOD)
    return tmp_path


def job(text: str) -> str:
    """The good recipe with a teacher whose body is ``text``."""
    return GOOD.replace(f"{{job: fit, model: {MODEL}}}", text)


FIT = f"job: fit, model: {MODEL}"
MISTAKES: dict[str, tuple[str, list[str], list[str]]] = {
    # name: (recipe, command line after it, what the message has)
    "unknown argument of a job": (
        GOOD.replace("teacher: teacher", "teacher: teacher, temprature: 2"),
        [],
        ["stage 'student', key 'temprature'", "job 'distill' has no such argument", "did you mean 'temperature'?"],
    ),
    "unknown trainer argument": (
        GOOD.replace("max_steps", "max_step"),
        [],
        ["stage 'teacher', key 'trainer.max_step'", "did you mean 'max_steps'?"],
    ),
    "unknown argument of a class": (
        job(f"{{{FIT.replace('hidden', 'hiden')}}}"),
        [],
        ["stage 'teacher', key 'model.init_args.hiden'", "MLP has no such argument", "did you mean 'hidden'?"],
    ),
    "unknown argument of a class in a list": (
        GOOD.replace(
            "cpu}", "cpu, callbacks: [{class_path: lightning.pytorch.callbacks.Timer, init_args: {verbos: 1}}]}"
        ),
        [],
        ["stage 'teacher', key 'trainer.callbacks[0].init_args.verbos'", "did you mean 'verbose'?"],
    ),
    "wrong type": (
        GOOD.replace("teacher: teacher", "teacher: teacher, temperature: hot"),
        [],
        ["stage 'student', key 'temperature'", "is 'hot': expected float"],
    ),
    "wrong type in a class": (
        job(f"{{{FIT.replace('64', 'many')}}}"),
        [],
        ["stage 'teacher', key 'model.init_args.in_features'", "is 'many': expected int"],
    ),
    "null for a number": (
        GOOD.replace("teacher: teacher", "teacher: teacher, alpha: null"),
        [],
        ["stage 'student', key 'alpha'", "is null: expected float"],
    ),
    "missing argument": (
        job("{job: fit}"),
        [],
        ["stage 'teacher', key 'model'", "is required by job 'fit' and not given"],
    ),
    "no training budget": (
        GOOD.replace("max_steps: 2, ", ""),
        [],
        ["stage 'teacher', key 'trainer'", "neither max_epochs nor max_steps", "e.g. {max_epochs: 10}"],
    ),
    "unknown job": (
        GOOD.replace("job: distill", "job: distil"),
        [],
        ["stage 'student', key 'job'", "unknown job 'distil'", "did you mean 'distill'?"],
    ),
    "job that is a list": (job("{job: [fit]}"), [], ["stage 'teacher', key 'job'", "unknown job ['fit']"]),
    "stage without a job": (
        job(f"{{model: {MODEL}}}"),
        [],
        ["key 'teacher'", "neither a stage (it has no job) nor an argument that a stage's job takes"],
    ),
    "unknown shared argument": (
        GOOD.replace("trainer:", "trainr:"),
        [],
        ["key 'trainr'", "did you mean 'trainer'?"],
    ),
    "class that does not exist": (
        GOOD.replace("Digits", "Digts"),
        [],
        ["stage 'teacher', key 'data.class_path'", "module 'workbench.data' has no 'Digts'", "did you mean 'Digits'?"],
    ),
    "module that does not exist": (
        GOOD.replace("workbench.data", "workbnch.data"),
        [],
        ["stage 'teacher', key 'data.class_path'", "there is no module 'workbnch'", "did you mean 'workbench'?"],
    ),
    "stage named before it exists": (
        GOOD.replace("student:", "first: {job: export, of: student}\nstudent:"),
        [],
        ["stage 'first', key 'of'", "stage 'student' is named before it exists: move it above 'first'"],
    ),
    "stage that does not exist": (
        GOOD.replace("teacher: teacher", "teacher: techer"),
        [],
        ["stage 'student', key 'teacher'", "'techer' is neither a stage above nor a folder", "did you mean 'teacher'?"],
    ),
    "cycle": (
        "a: {job: export, of: c}\nb: {job: export, of: a}\nc: {job: export, of: b}\n",
        [],
        ["stage 'a', key 'of'", "the stages need each other in a cycle: a -> c -> b -> a"],
    ),
    "reference to itself": (
        GOOD.replace("teacher: teacher", "teacher: student"),
        [],
        ["stage 'student', key 'teacher'", "the stage names itself", "allowed: teacher"],
    ),
    "empty file": ("", [], ["r.yaml: the file is empty"]),
    "file with comments only": ("# A recipe\n", [], ["r.yaml: the file is empty"]),
    "list": ("- job: fit\n", [], ["r.yaml: a mapping is expected, found a list"]),
    "text": ("job\n", [], ["r.yaml: a mapping is expected, found the text 'job'"]),
    "no stage": ("seed_everything: 1\n", [], ["r.yaml: has no stage", "e.g. 'teacher: {job: fit, ...}'"]),
    "not YAML": ("teacher: {job: fit\nx: 1", [], ["r.yaml, line 2, column 2: not valid YAML"]),
    "tabs": ("teacher:\n\tjob: fit\n", [], ["r.yaml, line 2, column 1: not valid YAML"]),
    "duplicate stage": (
        GOOD + "teacher: {job: report}\n",
        [],
        ["r.yaml, line 6, column 1", "key 'teacher' is given twice"],
    ),
    "duplicate key": ("teacher: {job: fit, job: fit}\n", [], ["r.yaml, line 1, column 21", "key 'job' is given twice"]),
    "YAML in itself": (
        "a: &a {job: fit, model: *a}\n",
        [],
        ["r.yaml: not valid YAML: nested too deeply, or in itself"],
    ),
    "code in YAML": ("a: !!python/object/apply:os.getcwd []\n", [], ["r.yaml, line 1, column 4: not valid YAML"]),
    "bad name of a stage": (GOOD + "../up: {job: report}\n", [], ["stage '../up'", "letters, digits, '_' and '-'"]),
    "out in a stage": (
        GOOD.replace("teacher: teacher", "teacher: teacher, out: x"),
        [],
        ["stage 'student', key 'out'", "--out"],
    ),
    "missing fragment": (
        GOOD.replace("teacher: teacher", "teacher: teacher, task: fragmnt.yaml"),
        [],
        ["stage 'student', key 'task'", "no file 'fragmnt.yaml'", "did you mean 'fragment.yaml'?"],
    ),
    "broken fragment": (
        GOOD.replace("teacher: teacher", "teacher: teacher, task: broken.yaml"),
        [],
        ["r.yaml, stage 'student', key 'task'", "broken.yaml, line 1, column 6: not valid YAML"],
    ),
    "override of an unknown stage": (
        GOOD,
        ["--techer.seed_everything", "1"],
        ["r.yaml: --techer.", "did you mean 'teacher'?"],
    ),
    "override of an unknown argument": (
        GOOD,
        ["--student.temprature", "1"],
        ["stage 'student', key 'temprature'", "did you mean 'temperature'?"],
    ),
    "override of an unknown trainer argument": (
        GOOD,
        ["--trainer.max_step", "1"],
        ["stage 'teacher', key 'trainer.max_step'", "did you mean 'max_steps'?"],
    ),
    "override inside a value": (
        GOOD,
        ["--teacher.job.name", "1"],
        ["--teacher.job.name: teacher.job is fit, which has no keys"],
    ),
    "override of the wrong type": (
        GOOD,
        ["--student.alpha", "much"],
        ["stage 'student', key 'alpha'", "is 'much': expected float"],
    ),
    "override that is no YAML": (
        GOOD,
        ["--student.alpha", "[1"],
        ["--student.alpha: '[1' is line 1, column 3: not valid YAML"],
    ),
    "override without a value": (
        GOOD,
        ["--student.alpha"],
        ["--student.alpha: a value is missing; write --student.alpha VALUE"],
    ),
    "override before a flag": (GOOD, ["--student.alpha", "--print"], ["--student.alpha: a value is missing"]),
    "override without a key": (GOOD, ["--student.", "1"], ["--student.: write --stage.argument value"]),
    "unknown option": (GOOD, ["--outt", "x"], ["r.yaml, key 'outt'", "neither a stage"]),
    "short option": (GOOD, ["-o", "x"], ["-o: no such option; arguments are given as --stage.argument value"]),
    "out without a folder": (GOOD, ["--out="], ["--out: a folder is missing"]),
    "flag with a value": (GOOD, ["--print=yes"], ["--print takes no value"]),
    "copy with an override": (GOOD, ["--copy", "--seed_everything", "1"], ["--copy takes a recipe and a file only"]),
    "copy into three": (
        GOOD,
        ["--copy", "s.yaml", "t.yaml"],
        ["t.yaml: one recipe at a time, r.yaml is given already"],
    ),
    "copy over itself": (GOOD, ["--copy"], ["r.yaml: exists and is not overwritten", "--copy r.yaml r_2.yaml"]),
    "copy to no YAML": (GOOD, ["--copy", "my"], ["my: a recipe is a YAML file: write --copy r.yaml my.yaml"]),
    "copy below a file": (GOOD, ["--copy", "r.yaml/my.yaml"], ["r.yaml/my.yaml: cannot be written: "]),
    "two recipes": (GOOD, ["s.yaml"], ["s.yaml: one recipe at a time, r.yaml is given already"]),
    "not text": ("\udcff\udcfe", [], ["r.yaml: is not UTF-8 text"]),
}


def snapshot(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    text, arguments, fragments = MISTAKES[name]
    (here / "r.yaml").write_bytes(text.encode(errors="surrogateescape"))
    (here / "fragment.yaml").write_text("class_path: workbench.tasks.Classification\n")
    (here / "broken.yaml").write_text("a: [1")
    before = snapshot(here)
    code, out, err = lightning(capsys, "r.yaml", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "one line"
    for fragment in fragments:
        assert fragment in err
    assert snapshot(here) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digit"], "digit: neither a file nor a bundled recipe; did you mean 'digits'?"),
        (["q.yaml"], "q.yaml: neither a file nor a bundled recipe; did you mean 'r.yaml'?"),
        (["folder"], "folder: is a folder, a recipe is a file: one of folder/x.yaml"),
        (["x" * 5000], "neither a file nor a bundled recipe"),
        (["train.py"], "train.py: a recipe is a YAML file; 'fabric run' starts scripts"),
        (["--print"], "no recipe is named; 'run' alone lists the bundled ones"),
        (["--teacher.x", "1"], "no recipe is named"),
    ],
)
def test_a_recipe_that_is_not_there(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (here / "folder").mkdir()
    (here / "folder" / "x.yaml").write_text(GOOD)
    code, out, err = lightning(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_the_command_line_is_read_in_order() -> None:
    words = ["r.yaml", "--a.b", "-1", "--a.b=x=y", "--out", "o", "--replace", "--c", "", "--print", "-h"]
    assert cli.parse(words) == Options("r.yaml", [("a.b", "-1"), ("a.b", "x=y"), ("c", "")], "o", True, True, True)
    assert cli.parse(["--copy", "digits", "-"]) == cli.parse(["digits", "-", "--copy"])
    assert cli.parse(["--copy", "digits", "-"]) == Options("digits", copy=True, target="-")
    assert cli.parse([]) == Options()
    with pytest.raises(RecipeError):
        cli.parse(["--out"])


def test_listing_and_help(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, listing, _ = lightning(capsys)
    assert code == 0
    assert all(f"  {name} " in listing for name in recipe.recipes())
    code, usage, _ = lightning(capsys, "--help")
    assert (code, usage[:29]) == (0, "usage: lightning run RECIPE [")
    assert max(map(len, usage.splitlines())) <= 80
    code, text, _ = lightning(capsys, "r.yaml", "--student.temperature", "2", "--help")
    assert code == 0
    assert "  --student.temperature FLOAT  (2)\n      Softens both outputs" in text


def test_help_and_listing_need_neither_torch_nor_lightning(here: Path) -> None:
    copy = ["--copy", "digits", "-"]
    for arguments in ([], ["--help"], ["r.yaml", "--help"], ["digits", "--help"], ["missing.yaml"], copy):
        code = (
            "import sys; from workbench.launcher.cli import main\n"
            f"try: main('lightning', {['run', *arguments]!r})\n"
            "finally: print(sorted({n.partition('.')[0] for n in sys.modules}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        loaded = done.stdout.splitlines()[-1]
        for heavy in ("torch", "lightning", "pytorch_lightning", "jsonargparse", "transformers", "numpy"):
            assert f"'{heavy}'" not in loaded, arguments


def test_a_copy_says_what_to_type_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = lightning(capsys, "--copy", "digits")
    assert (code, err) == (0, "")
    assert " is copied to digits.yaml. " in out
    assert out.endswith(":\n  lightning run digits.yaml\n  lightning run digits.yaml --help\n")
    code, out, _ = lightning(capsys, "digits.yaml", "--help")
    assert (code, out.splitlines()[0]) == (0, "digits.yaml")
    _, out, _ = lightning(capsys, "--copy", "mnist", "mine.yml")
    assert "\n  DATA=/folder/of/data lightning run mine.yml\n" in out
    before = snapshot(here)
    code, out, _ = lightning(capsys, "--copy", "digits", "-")
    assert (code, out, snapshot(here)) == (0, (here / "digits.yaml").read_text(), before)


def test_print_is_a_recipe_that_prints_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = lightning(capsys, "r.yaml", "--student.temperature", "2", "--print")
    assert code == 0
    assert text.startswith("# A small one\n")
    assert "\n  temperature: 2.0\n" in text
    (here / "printed.yaml").write_text(text)
    assert lightning(capsys, "printed.yaml", "--print") == (0, text, "")
    assert snapshot(here) == [str(here / "printed.yaml"), str(here / "r.yaml")], "and nothing ran"


PLUGIN = """
from pathlib import Path
def make(size: int = 1, fail: bool = False, out: Path = Path()) -> dict:
    '''Make something.'''
    if fail:
        raise ArithmeticError("as asked")
    return {"size": size}
"""


@pytest.fixture
def plugin(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that offers the job `make`, and a recipe for it."""
    write_metadata(here / "site", "plugin_for_the_cli", "[workbench.jobs]\nmake = plugin_for_the_cli:make\n")
    (here / "site" / "plugin_for_the_cli.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(here / "site")
    (here / "r.yaml").write_text("first: {job: make}\nsecond: {job: make, size: 2}\n")
    return here


def test_a_run_and_its_second_run(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lightning(capsys, "r.yaml")[0] == 0
    records = {name: plugin / "runs" / "r" / name / "record.json" for name in ("first", "second")}
    before = {name: path.read_text() for name, path in records.items()}
    assert json.loads(before["second"])["size"] == 2
    code, _, err = lightning(capsys, "r.yaml")
    assert code == 0
    assert err.count("kept") == 2
    assert {name: path.read_text() for name, path in records.items()} == before


def test_a_failing_stage_exits_with_one(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = lightning(capsys, "r.yaml", "--first.fail", "true", "--out", "o")
    assert code == 1
    assert "error: stage 'first': ArithmeticError: as asked\n" in err
    assert "Traceback" not in err
    assert "as asked" in json.loads((plugin / "o" / "first" / "record.json").read_text())["error"]
    assert not (plugin / "o" / "second").exists()


def test_what_is_in_the_way_exits_with_two(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightning(capsys, "r.yaml", "--out", "o")
    code, _, err = lightning(capsys, "r.yaml", "--out", "o", "--first.size", "5")
    assert code == 2
    assert "size 1 instead of 5" in err
    assert lightning(capsys, "r.yaml", "--out", "o", "--first.size", "5", "--replace")[0] == 0
    (plugin / "o" / "first" / "record.json").write_text("{")
    code, _, err = lightning(capsys, "r.yaml", "--out", "o", "--first.size", "5")
    assert code == 2
    assert "record.json is not JSON" in err
    (plugin / "file").write_text("")
    code, _, err = lightning(capsys, "r.yaml", "--out", "file")
    assert code in (1, 2)
    assert "Traceback" not in err


def test_a_job_that_is_broken_exits_with_two(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = plugin / "site" / "plugin_for_the_cli-1.0.dist-info" / "entry_points.txt"
    (plugin / "site" / "dear.py").write_text("import not_there\ndef job(size=1, out=None): ...\nclass Job: ...\n")
    for value, said in {
        "gone:job": "there is no module 'gone'; reinstall plugin_for_the_cli, which offers it",
        "dear:Job": "cannot be imported: ModuleNotFoundError: No module named 'not_there'",
        "dear:job": "cannot be imported: ModuleNotFoundError: No module named 'not_there'",
        "pathlib:Path": "is not a plain function: a job is a 'def' at the top of a module",
    }.items():
        entries.write_text(f"[workbench.jobs]\nmake = {value}\n")
        os.utime(entries.parent.parent)
        code, _, err = lightning(capsys, "r.yaml")
        assert code == 2
        assert f"r.yaml, stage 'first', key 'job': job 'make' ({value}): {said}" in err


def test_ctrl_c_exits_with_130(
    plugin: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.launcher.runner.run", interrupted)
    code, _, err = lightning(capsys, "r.yaml")
    assert (code, err) == (130, "stopped; the same command goes on from here\n")


def process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


CALL = "import sys; sys.argv = ['lightning', 'login', '--x']; from workbench.launcher.cli import main; sys.exit(main())"


def test_anything_else_goes_to_lightning_sdk_if_it_is_installed(tmp_path: Path) -> None:
    info = tmp_path / "lightning_sdk-2026.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 2026.1\n")
    entry = "lightning_sdk.cli.entrypoint:main_cli"
    (info / "entry_points.txt").write_text(f"[console_scripts]\nlightning = {entry}\nlightning-sdk = {entry}\n")
    package = tmp_path / "lightning_sdk" / "cli"
    package.mkdir(parents=True)
    (package / "entrypoint.py").write_text(
        "import sys\ndef main_cli():\n    print('sdk', sys.argv[1:])\n    return 5\n"
    )
    done = process(tmp_path, "-c", CALL)
    assert (done.returncode, done.stdout) == (5, "sdk ['login', '--x']\n")


FABRIC = "import sys\ndef _main():\n    print('fabric', sys.argv[1:])\n    return 6\n"


@pytest.mark.parametrize(("source", "code", "said"), [(FABRIC, 6, "fabric ['login', '--x']\n"), ("", 1, "")])
def test_else_it_goes_to_fabric(tmp_path: Path, source: str, code: int, said: str) -> None:
    package = tmp_path / "lightning" / "fabric"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "cli.py").write_text(source)
    done = process(tmp_path, "-c", CALL)
    assert (done.returncode, done.stdout) == (code, said)
    assert "click" in done.stderr if code == 1 else not done.stderr


def test_the_module_is_the_same_command(plugin: Path) -> None:
    site = plugin / "site"
    done = process(site, "-m", "workbench", "run")
    assert done.returncode == 0
    assert "python -m workbench run NAME" in done.stdout
    assert process(site, "-m", "workbench").stdout.startswith("usage: python -m workbench run RECIPE")
    done = process(site, "-m", "workbench", "fly")
    assert (done.returncode, done.stdout, done.stderr[:6]) == (2, "", "usage:")
    done = process(site, "-m", "workbench", "run", "../r.yaml", "--first.sizee", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'size'?" in done.stderr
