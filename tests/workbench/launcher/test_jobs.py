"""Jobs found by entry point and read from their sources."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tests.helpers.distributions import write_metadata
from tests.helpers.processes import forked
from workbench.launcher.cli import main
from workbench.launcher.jobs import Job, find_jobs
from workbench.launcher.signatures import REQUIRED

SOURCE = '''
raise ImportError("reading a job must not import it")

def job(data: "list[int]", *, rate: float = 0.5, name: str | None = None, out: Path = Path("x")) -> dict:
    """Do it.

    More about it.

    Args:
        data: Numbers,
            two lines of them.
        rate (float): A share.
        out: The folder.

    Returns:
        Nothing: at all.
    """

class Thing: ...
async def later(out): ...
def no_folder(x): ...
def anything(out, **options): ...
def by_position(x, /, out): ...
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "package_with_jobs"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise ImportError('nor its package')")
    (tmp_path / name / "jobs.py").write_text(SOURCE)
    (tmp_path / name / "broken.py").write_text("def job(:")
    (tmp_path / "reexporting.py").write_text("from defining import job, lam")
    (tmp_path / "defining.py").write_text("def job(size: int, out=None):\n    '''Elsewhere.'''\nlam = lambda out: 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in ("reexporting", "defining"):
        sys.modules.pop(module, None)


def offered(value: str) -> Job:
    return Job("mine", EntryPoint("mine", value, "workbench.jobs"))


def test_a_job_is_read_without_importing_it(package: str) -> None:
    job = offered(f"{package}.jobs:job")
    assert job.summary == "Do it."
    found = [(p.name, p.annotation, p.default, p.description) for p in job.parameters]
    assert found == [
        ("data", "'list[int]'", REQUIRED, "Numbers, two lines of them."),
        ("rate", "float", "0.5", "A share."),
        ("name", "str | None", "None", ""),
    ]


def test_a_job_defined_in_another_module_is_found_there(package: str) -> None:
    job = offered("reexporting:job")
    assert (job.summary, [p.name for p in job.parameters]) == ("Elsewhere.", ["size"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere_at_all:job", "there is no module 'nowhere_at_all'"),
        ("package_with_jobs.nowhere:job", "there is no module 'package_with_jobs.nowhere'"),
        ("defining.deeper:job", "there is no module 'defining.deeper'"),
        ("package_with_jobs.broken:job", "its source cannot be read: invalid syntax"),
        ("package_with_jobs.jobs:Thing", "cannot be imported"),
        ("defining:missing", "cannot be imported: AttributeError"),
        ("reexporting:lam", "is not a plain function: a job is a 'def'"),
        ("pathlib:Path", "is not a plain function"),
        ("math:sqrt", "is not a plain function"),
        ("package_with_jobs.jobs:no_folder", r"one of them 'out: Path'.* takes \(x\)"),
        ("package_with_jobs.jobs:anything", r"takes named arguments.*\*\*options"),
        ("package_with_jobs.jobs:by_position", "takes named arguments"),
    ],
)
def test_what_cannot_be_a_job_says_why(package: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _ = offered(value).parameters
    assert f"job 'mine' ({value})" in str(caught.value)


def test_this_projects_jobs() -> None:
    jobs = find_jobs()
    assert {"fit", "distill", "hunt", "export", "report"} <= set(jobs)
    for job in jobs.values():
        assert job.summary, job
        assert all(parameter.description for parameter in job.parameters), job


def distribution(folder: Path, name: str, entries: str) -> None:
    write_metadata(folder, name, f"[workbench.jobs]\n{entries}\n")


def test_a_package_adds_a_job_and_cannot_take_a_name_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "a-user", "count = a_user:count\nfit = a_user:fit")
    monkeypatch.syspath_prepend(tmp_path)
    jobs = find_jobs()
    assert jobs["count"].entry.value == "a_user:count"
    assert jobs["fit"].entry.value == "workbench.training.fit:fit"


def test_a_users_job_runs_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "a-user", "count = a_user_jobs:count")
    (tmp_path / "a_user_jobs.py").write_text(
        "from pathlib import Path\n"
        "def count(to: int = 3, out: Path = Path()) -> dict:\n"
        "    '''Count.'''\n"
        "    return {'metrics': {'test/loss': float(sum(range(to)))}}\n"
    )
    (tmp_path / "r.yaml").write_text("counting: {job: count, to: 4}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    process = forked(main, "python -m workbench", ["run", "r.yaml", "--out", "o"], output="output.txt")
    process.join()
    assert process.exitcode == 0, Path("output.txt").read_text()
    assert '"test/loss": 6.0' in (tmp_path / "o" / "counting" / "record.json").read_text()
