"""Several processes: ranks and what they agree on, and weights sharded over them. Names are imported on first use."""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from workbench.distributed.ranks import all_gather, barrier, check_ranks_agree, full_tensor, rank, world_size
    from workbench.distributed.sharding import full_state_dict, load_full_state_dict, shard

__all__ = [
    "all_gather",
    "barrier",
    "check_ranks_agree",
    "full_state_dict",
    "full_tensor",
    "load_full_state_dict",
    "rank",
    "shard",
    "world_size",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "all_gather": "workbench.distributed.ranks",
        "barrier": "workbench.distributed.ranks",
        "check_ranks_agree": "workbench.distributed.ranks",
        "full_state_dict": "workbench.distributed.sharding",
        "full_tensor": "workbench.distributed.ranks",
        "load_full_state_dict": "workbench.distributed.sharding",
        "rank": "workbench.distributed.ranks",
        "shard": "workbench.distributed.sharding",
        "world_size": "workbench.distributed.ranks",
    },
)
