from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.ranks import on_ranks
from workbench.distributed.ranks import all_gather, barrier, check_ranks_agree, check_world_size, rank, world_size


@pytest.mark.parametrize(
    ("environment", "world_size", "refused"),
    [
        ({}, 1, False),
        ({}, 2, False),
        ({"WORLD_SIZE": "4"}, 1, False),
        ({"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, 1, True),
        ({"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, 4, False),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, True),
    ],
)
def test_launcher_and_trainer_must_agree(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], world_size: int, refused: bool
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(ValueError, match=f"world size of {world_size}"):
            check_world_size(world_size)
    else:
        check_world_size(world_size)


def test_ranks_with_different_parameters_are_refused() -> None:
    def compared() -> tuple[Any, str]:
        assert world_size() == 1
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        check_ranks_agree(network)
        with torch.no_grad():
            network.bias[1] += 1e-6 * rank()
        barrier()
        try:
            check_ranks_agree(network)
        except RuntimeError as error:
            return [*all_gather(rank()), world_size()], str(error)
        return None, ""

    for found, said in on_ranks(compared):
        assert found == [0, 1, 2]
        assert "ranks hold different parameters" in said


def test_alone_there_is_nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (rank(), world_size(), all_gather("a")) == (0, 1, ["a"])
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert rank() == 3, "as the launcher says"
    check_ranks_agree(nn.Linear(2, 2))
    barrier()
