"""``auto`` on a real device: it leaves the room that training needs, and makes more when it needs more."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

MiB, GiB = 1 << 20, 1 << 30
NUMEL = 500_000_000  # 1 GB of weights and of gradients each in bf16, 4 GB of 32-bit state


class Training:
    """Weights, gradients, and activations of any size for the length of a forward."""

    def __init__(self) -> None:
        self.params = [
            Parameter(torch.zeros(NUMEL // 10, dtype=torch.bfloat16, device="cuda")) for _ in range(10)
        ]

    def forward(self, activations: int) -> None:
        held = [
            torch.empty(64 * MiB, dtype=torch.uint8, device="cuda") for _ in range(activations // (64 * MiB))
        ]
        for param in self.params:
            param.grad = torch.ones_like(param)
        del held


def balloon(leave: int) -> Tensor:
    """Take all of the GPU but so many bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(free - leave, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (5 * GiB, "32bit"),
        (3 * GiB, "8bit"),
        (700 * MiB, "8bit, partly paged"),
        (250 * MiB, "8bit, partly paged"),
    ],
)
def test_what_is_chosen_really_trains(state: int, expected: str) -> None:
    training = Training()
    activations = GiB
    slack = int(0.02 * torch.cuda.mem_get_info()[1])
    taken = balloon(NUMEL * 2 + activations + slack + state)
    torch.cuda.reset_peak_memory_stats()
    failed = torch.cuda.memory_stats().get("num_ooms", 0)
    optimizer = AdamW(training.params)
    taken_by_state = 0
    for step in range(4):
        training.forward(activations)
        before = torch.cuda.memory_allocated()
        optimizer.step()
        taken_by_state += torch.cuda.memory_allocated() - before
        moved = [float(param.detach()[-1]) for param in training.params]
        assert all(weight < 0 for weight in moved), (step, moved)  # against gradients of 1, from 0
        optimizer.zero_grad()
    torch.cuda.synchronize()
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    assert optimizer.plan.chosen.name == expected
    memory = optimizer.memory()
    predicted = optimizer.plan.chosen.gpu_bytes
    assert memory["gpu"] + memory["staging"] == pytest.approx(predicted, rel=0.01)
    assert taken_by_state == pytest.approx(predicted, rel=0.01)
    assert torch.cuda.memory_stats().get("num_ooms", 0) == failed
    del taken


def test_a_retry_after_running_out_of_memory_finds_room() -> None:
    training = Training()
    taken = balloon(NUMEL * 2 + 6 * GiB + int(0.02 * torch.cuda.mem_get_info()[1]))
    torch.cuda.reset_peak_memory_stats()
    optimizer = AdamW(training.params)
    failures = 0
    for step in range(8):
        while True:
            try:
                training.forward(GiB if step < 4 else 4 * GiB)
                break
            except torch.OutOfMemoryError:
                failures += 1
                assert failures < 20
        optimizer.step()
    torch.cuda.synchronize()
    assert failures > 0
    assert optimizer.memory()["host"] > 0
    del taken
