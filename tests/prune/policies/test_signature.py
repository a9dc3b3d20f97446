"""A callback takes the arguments of its policy, in every framework, and its help describes them."""

import inspect
import pydoc
import re
from typing import Any, get_type_hints

import jsonargparse
import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl

import prune
import prune.callbacks
import prune.hf
import prune.policies
from prune.levels import Levels
from prune.policies import Policy
from tests.helpers.policy_cases import CASES

TWINS: dict[str, type[Policy]] = {case.callback: case.policy for case in CASES.values()}
EVERY = pytest.mark.parametrize("name", TWINS)


@EVERY
def test_policy_callback_and_twin_have_one_signature(name: str) -> None:
    policy, callback, twin = TWINS[name], getattr(prune, name), getattr(prune.hf, name)
    assert inspect.signature(callback) == inspect.signature(twin) == inspect.signature(policy)
    hints = get_type_hints(policy.__init__)
    assert get_type_hints(callback.__init__) == get_type_hints(twin.__init__) == hints
    for each in (callback, twin):
        assert each.__init__.__doc__ == policy.__doc__
        assert "Args:" not in each.__doc__, "arguments are described in the policy"
        assert f":class:`prune.policies.{policy.__name__}`" in each.__doc__
        assert all(f"{argument}:" in pydoc.render_doc(each) for argument in inspect.signature(policy).parameters)


@EVERY
def test_every_argument_is_described(name: str) -> None:
    arguments = str(TWINS[name].__doc__).partition("Args:")[2].split("\n\n")[0]
    described = re.findall(r"^        (\w+): ", arguments, re.MULTILINE)
    assert described == list(inspect.signature(TWINS[name]).parameters)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "GradualPruning": {"density": 0.1, "begin": "1ep", "end": "3ep", "every": "100it"},
    "DynamicSparsity": {"density": 0.1, "begin": "1ep", "end": "3ep", "every": "100it", "growth": "set"},
    "LotteryTicket": {"levels": Levels(3, rate=0.5), "rewind": "10it"},
}


@pytest.mark.parametrize("namespace", [lp, pl], ids=["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_parser_reads_and_explains_them(name: str, namespace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=namespace.Callback)
    config = {"class_path": f"prune.{name}", "init_args": ARGUMENTS[name]}
    callback = parser.instantiate(parser.parse_object({"callback": config})).callback
    assert isinstance(callback, getattr(prune, name))
    assert isinstance(callback, namespace.Callback)
    wrong = {"class_path": f"prune.{name}", "init_args": {**ARGUMENTS[name], "densiti": 0.1}}
    with pytest.raises(Exception, match=rf"(?s)prune\.{name}.*'?densiti"):
        parser.parse_object({"callback": wrong})
    with pytest.raises(SystemExit):
        parser.parse_args([f"--callback.help=prune.{name}"])
    assert "Share of the prunable weights" in " ".join(capsys.readouterr().out.split())


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(TypeError, match="'begin', 'end', and 'every'"):
        prune.GradualPruning(0.1)  # type: ignore[call-arg]
