"""Plans for one of several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import adamw_triton
from adamw_triton.selection.plans import Plan

MEMORY: dict[str, Any] = {"gpu_memory": "24GiB", "host_memory": "64GiB", "activations": 0}


def model() -> nn.Module:
    """Two layers of 3 MB, 8 MB beside them, 64 elements of which are a vector; fp32."""
    with torch.device("meta"):
        found = nn.Module()
        found.embed = nn.Linear(1000, 2000, bias=False)
        found.layers = nn.ModuleList(nn.Linear(750, 1000, bias=False) for _ in range(2))
        found.norm = nn.LayerNorm(64, bias=False)
    return found


def spent(plan: Plan) -> dict[str, int]:
    return dict(plan.limits[0].spent)


def test_shards_and_what_is_gathered() -> None:
    alone, one = adamw_triton.plan(model(), **MEMORY), adamw_triton.plan(model(), **MEMORY, ranks=4)
    assert spent(one)["weights"] == spent(one)["gradients"] == spent(alone)["weights"] // 4
    rest, layer = 8_000_000 + 256, 3_000_000
    assert spent(one)["gathered layers"] == rest + 2 * layer + rest
    assert "gathered layers" not in spent(alone)
    assert one.candidates[0].gpu_bytes == pytest.approx(alone.candidates[0].gpu_bytes / 4, rel=1e-3)
    assert one.host_room == alone.host_room // 4
    assert "one of 4 ranks (parameters, gradients and state in shards)" in str(one)


def test_formats_are_those_of_the_shards() -> None:
    """By the whole size; 32 bits where rows are no whole blocks."""
    params = [Parameter(torch.empty(shape, device="meta")) for shape in ((1024, 128), (1024, 100), (65536,))]
    one = adamw_triton.plan(params, **MEMORY, ranks=64)
    coded = next(each for each in one.candidates if each.variant == "8bit")
    codes, wide = 1024 * 128 // 64, (1024 * 100 + 65536) // 64
    assert coded.gpu_bytes == pytest.approx(2.03125 * codes + 8 * wide, rel=0.02)


def test_replicas() -> None:
    alone, one = (
        adamw_triton.plan(model(), **MEMORY, **how) for how in ({}, {"ranks": 2, "sharding": "none"})
    )
    assert spent(one)["weights"] == spent(alone)["weights"]
    assert spent(one)["buckets of gradients"] == spent(one)["gradients"]
    assert [each.gpu_bytes for each in one.candidates] == [each.gpu_bytes for each in alone.candidates]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "Invalid ranks: 0"),
        ({"ranks": 2, "sharding": "half"}, "Invalid sharding: 'half'; it must be one of 'full', 'none'"),
        ({"ranks": 2, "gradient_release": True}, "is for one process, and ranks=2"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw_triton.plan(model(), **MEMORY, **arguments)
