"""Gradient release on a GPU, where autograd has a thread and streams of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamw_triton import AdamW
from adamw_triton.state import placement
from tests.optimizer.problems import bits, state_bits

pytestmark = pytest.mark.gpu
WIDTH, LAYERS = 2048, 24


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    return nn.Sequential(*layers).cuda().to(torch.bfloat16)


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed)).cuda().to(torch.bfloat16)
    loss: Tensor = model(x).float().square().mean()
    loss.backward()


def step(model: nn.Module, optimizer: AdamW, seed: int) -> None:
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_32bit", "paged_8bit"])
@pytest.mark.parametrize("stream", ["default", "own"])
def test_the_bits_of_an_ordinary_step(variant: str, stream: str) -> None:
    model = tower()
    other = copy.deepcopy(model)
    how: dict[str, Any] = {"variant": variant, "master_weights": True, "lr": 1e-4}
    how |= {"transfer": "copy"} if "paged" in variant else {}
    plain, released = (
        AdamW(model.parameters(), **how),
        AdamW(other.parameters(), gradient_release=True, **how),
    )
    with torch.cuda.stream(torch.cuda.Stream() if stream == "own" else torch.cuda.default_stream()):
        for seed in range(6):
            step(model, plain, seed)
            step(other, released, seed)
    torch.cuda.synchronize()
    assert bits(list(model.parameters())) == bits(list(other.parameters()))
    assert state_bits(plain) == state_bits(released)


def test_gradients_take_little_memory() -> None:
    """Beside the same run without: all gradients but those that may be there at one time."""
    peaks = []
    for release in (False, True):
        model = tower()
        optimizer = AdamW(model.parameters(), variant="8bit", gradient_release=release)
        for seed in range(3):
            if seed == 2:
                torch.cuda.reset_peak_memory_stats()
            step(model, optimizer, seed)
        peaks.append(torch.cuda.max_memory_allocated())
        del model, optimizer
        torch.cuda.empty_cache()
    sizes = [WIDTH * WIDTH * 2] * LAYERS
    assert peaks[0] - peaks[1] > 0.9 * (sum(sizes) - placement.live_bytes(sizes))
