"""Micro-batches that add up in pinned host memory, on a GPU: its streams, autograd's thread, its memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from adamw_triton import AdamW
from adamw_triton.state import placement
from tests.optimizer.problems import bits, state_bits
from tests.optimizer.test_release_on_gpu import LAYERS, WIDTH, backward, tower

pytestmark = pytest.mark.gpu
HOST: dict[str, Any] = {"gradient_release": True, "accumulate_on": "host"}


def step(model: nn.Module, optimizer: AdamW, seed: int, micro_batches: int = 4) -> None:
    with optimizer.accumulating():
        for micro in range(micro_batches - 1):
            backward(model, 10 * seed + micro)
    backward(model, 10 * seed + 9)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_32bit", "paged_8bit"])
@pytest.mark.parametrize("stream", ["default", "own"])
def test_the_bits_of_accumulation_on_the_gpu(variant: str, stream: str) -> None:
    model = tower()
    other = copy.deepcopy(model)
    how: dict[str, Any] = {"variant": variant, "master_weights": True, "lr": 1e-4}
    plain, released = AdamW(model.parameters(), **how), AdamW(other.parameters(), **HOST, **how)
    with torch.cuda.stream(torch.cuda.Stream() if stream == "own" else torch.cuda.default_stream()):
        for seed in range(5):
            step(model, plain, seed)
            step(other, released, seed)
    torch.cuda.synchronize()
    assert bits(list(model.parameters())) == bits(list(other.parameters()))
    assert state_bits(plain) == state_bits(released)


def test_gradients_take_little_memory() -> None:
    """Beside the same run that accumulates on the GPU: all gradients but those that may be there at one time,
    and the sums' staging."""
    peaks = []
    for how in ({}, HOST):
        model = tower()
        optimizer = AdamW(model.parameters(), variant="8bit", **how)
        for seed in range(3):
            if seed == 2:
                torch.cuda.reset_peak_memory_stats()
            step(model, optimizer, seed)
        peaks.append(torch.cuda.max_memory_allocated())
        del model, optimizer
        torch.cuda.empty_cache()
    sizes = [WIDTH * WIDTH * 2] * LAYERS
    saved = sum(sizes) - placement.live_bytes(sizes) - placement.largest_ring()
    assert peaks[0] - peaks[1] > 0.9 * saved


def test_sums_are_in_pinned_memory() -> None:
    model = tower()
    optimizer = AdamW(model.parameters(), variant="8bit", accumulate_dtype=torch.float32, **HOST)
    step(model, optimizer, 0)
    sums = optimizer._places.sums
    assert sums is not None
    assert all(array.is_pinned() for buffer in sums._buffers for array in buffer.arrays.values())
    assert optimizer.memory()["sums"] == 4 * LAYERS * WIDTH * WIDTH
