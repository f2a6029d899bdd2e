"""``DistributedDataParallel``: ranks step replicas, by averaged gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adamw_triton import AdamW
from tests.distributed.ranks import together
from tests.optimizer.problems import bits, state_bits

CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "32bit": ({"variant": "32bit"}, torch.float32),
    "8bit": ({"variant": "8bit"}, torch.float32),
    "paged 8bit": ({"variant": "paged_8bit"}, torch.float32),
    "auto": ({}, torch.bfloat16),
    "exact weights": ({"variant": "paged_32bit", "master_weights": True}, torch.bfloat16),
    "dithered": ({"variant": "8bit", "stochastic_rounding": True}, torch.bfloat16),
    "clipped": ({"variant": "8bit", "max_grad_norm": 0.1, "nonfinite": "skip"}, torch.float32),
}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64)).to(dtype)


def loss_of(trained: nn.Module, rank: int, step: int) -> torch.Tensor:
    """Each rank has a batch of its own."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    dtype = next(trained.parameters()).dtype
    return trained(torch.randn(8, 64, generator=generator).to(dtype)).float().square().mean()


def trained(arguments: dict[str, Any], dtype: torch.dtype, steps: int, *, views: bool) -> Any:
    """Weights and state."""
    replica = DistributedDataParallel(model(dtype), gradient_as_bucket_view=views)
    optimizer = AdamW(replica.parameters(), lr=1e-3, **arguments)
    for step in range(steps):
        with replica.no_sync():  # micro-batches
            loss_of(replica, dist.get_rank(), 2 * step).backward()
        loss_of(replica, dist.get_rank(), 2 * step + 1).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not views)
    return bits([*replica.parameters()]), state_bits(optimizer)


def alone(arguments: dict[str, Any], dtype: torch.dtype, steps: int) -> Any:
    """One process with the batches of both ranks, whose gradients are averaged as gloo does."""
    whole = model(dtype)
    optimizer = AdamW(whole.parameters(), lr=1e-3, **arguments)
    params = [*whole.parameters()]
    for step in range(steps):
        of_ranks = []
        for rank in range(2):
            for micro in range(2):
                loss_of(whole, rank, 2 * step + micro).backward()
            of_ranks.append([param.grad for param in params])
            for param in params:
                param.grad = None
        for param, first, second in zip(params, *of_ranks, strict=True):
            assert first is not None
            assert second is not None
            param.grad = first / 2 + second / 2
        optimizer.step()
        optimizer.zero_grad()
    return bits(params), state_bits(optimizer)


def refusal() -> str:
    """What gradient_release says to several processes; the weights stay as they are."""
    replica = DistributedDataParallel(model())
    optimizer = AdamW(replica.parameters(), variant="8bit", gradient_release=True)
    try:
        loss_of(replica, dist.get_rank(), 0).backward()
    except RuntimeError as error:
        assert bits([*replica.parameters()]) == bits([*model().parameters()])
        assert not optimizer.state
        return str(error)
    return ""


def rank() -> Any:
    runs = {
        (name, views): trained(*given, 5, views=views)
        for name, given in CASES.items()
        for views in (False, True)
    }
    return runs, refusal()


@pytest.mark.slow
def test_replicas_have_the_bits_of_one_process_and_release_is_refused() -> None:
    found = together(2, rank)
    expected = {name: alone(*given, 5) for name, given in CASES.items()}
    for runs, refused in found:
        for (name, views), run in runs.items():
            assert run == expected[name], (name, views)
        assert refused.startswith("gradient_release=True is for one process, and there are 2: gradients")
        assert "gradient_release=False" in refused
