"""A run's process: its share of threads, and the reason why it failed, without starting one."""

import signal
from pathlib import Path

import pytest

from workbench import records
from workbench.launcher.sweep.process import FAILED, failure_reason, sigterm_as_interrupt, threads


def test_threads_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert [threads(shares) for shares in (1, 2, 3, 9)] == [7, 3, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert threads(1) >= threads(2) >= 1


def test_the_reason_is_the_record_else_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("--- 2001\nold\n--- 2002\n" + "\n".join(f"line {n}" for n in range(9)))
    ending = f"; {tmp_path / 'log.txt'} ends with:" + "".join(f"\n    line {n}" for n in range(4, 9))
    assert failure_reason(tmp_path, 1) == f"its process ended with exit code 1{ending}"
    assert failure_reason(tmp_path, -9) == f"its process was killed by SIGKILL{ending}"
    assert failure_reason(tmp_path, -99) == f"its process was killed by signal 99{ending}"
    records.write(tmp_path, {"status": "failed", "error": "Traceback\n  File\nValueError: too small\n"})
    assert failure_reason(tmp_path, FAILED) == "ValueError: too small"
    assert failure_reason(tmp_path, 1).startswith("its process ended"), "the record is an earlier attempt's"


def test_sigterm_is_an_interrupt_inside_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
