"""``ZeroRedundancyOptimizer``: each rank steps whole parameters, and has others than the next one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.selection import ranks
from tests.distributed.ranks import together
from tests.optimizer.problems import bits, copies, parameters, state_bits, train

CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "32bit": ({"variant": "32bit"}, torch.float32),
    "8bit": ({"variant": "8bit", "block_size": 256}, torch.float32),
    "paged 32bit": ({"variant": "paged_32bit", "memory_budget": "1GiB"}, torch.float32),
    "paged 8bit": ({"variant": "paged_8bit"}, torch.float32),
    "auto": ({}, torch.bfloat16),
    "exact weights": ({"variant": "paged_8bit", "master_weights": True}, torch.bfloat16),
    "dithered": ({"variant": "8bit", "stochastic_rounding": True}, torch.bfloat16),
    "adaptive clip": ({"variant": "8bit", "adaptive_clip": 1.05}, torch.float32),
}
SHAPES = ((80, 64), (80,), (64, 80), (3,), (128, 128))


def zero(params: list[Parameter], arguments: dict[str, Any], *, views: bool = False) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    how: dict[str, Any] = {"optimizer_class": AdamW, "parameters_as_bucket_view": views}
    return ZeroRedundancyOptimizer(params, **how, lr=1e-3, **arguments)


def consolidated(optimizer: Any) -> dict[str, Any]:
    """On all ranks. Rank 0 is given views of its live state, as of any state dict."""
    optimizer.consolidate_state_dict(to=0)
    found = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    return found[0]


def case(arguments: dict[str, Any], dtype: torch.dtype, views: bool) -> dict[str, bool]:
    """What has the bits of one process."""
    alone = AdamW(parameters(SHAPES, dtype), lr=1e-3, **arguments)
    sharded = zero(parameters(SHAPES, dtype), arguments, views=views)
    found = {"trained": bits(train(sharded, 5)) == bits(train(alone, 5))}
    state_dict = consolidated(sharded)
    params = sharded.param_groups[0]["params"]
    resumed, plain = zero(copies(params), arguments), AdamW(copies(params), lr=1e-3, **arguments)
    resumed.load_state_dict(copy.deepcopy(state_dict))  # it drops what is other ranks'
    plain.load_state_dict(state_dict)
    found["of one process"] = state_bits(plain) == state_bits(alone)
    expected = bits(train(alone, 2, first=6))
    for name, each in (("went on", sharded), ("resumed", resumed), ("in one process", plain)):
        found[name] = bits(train(each, 2, first=6)) == expected
    return found


def rank() -> dict[str, Any]:
    ranks.PATIENCE = 0.2  # under auto nobody comes to the first step of this rank's parameters
    found: dict[str, Any] = {
        f"{name}, views {views}": case(*given, views)
        for name, given in CASES.items()
        for views in (False, True)
    }
    few = ((128, 128),)
    without = zero(parameters(few), {"variant": "8bit"})
    expected = bits(train(AdamW(parameters(few), variant="8bit"), 3))
    found["a rank without parameters"] = {"trained": bits(train(without, 3)) == expected}
    for refused in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}):
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer it cannot be given at all"):
            zero(parameters(few), refused)
    return found


@pytest.mark.slow
def test_every_variant_has_the_bits_of_one_process_and_resumes() -> None:
    for found in together(2, rank):
        assert len(found) == 2 * len(CASES) + 1
        for name, right in found.items():
            assert all(right.values()), (name, right)
