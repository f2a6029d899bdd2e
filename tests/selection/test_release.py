"""variant="auto" under gradient release: it decides in the first backward, by what is still to come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamw_triton import AdamW
from adamw_triton.state import placement
from tests.selection.simulated import SimulatedGpu, install

MiB = 1 << 20
BUCKET = 64 << 10
LAYERS, WIDTH = 8, 256
WEIGHTS = LAYERS * WIDTH * WIDTH * 4


class Training:
    """Weights of 2 MiB, activations that backward hands back layer by layer, and the gradients that are
    there: all that the GPU has to hold, as often as a gradient arrives."""

    def __init__(self, simulated: SimulatedGpu, dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.gpu = simulated
        self.model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]).to(dtype)
        self.x = torch.ones(2, WIDTH, dtype=dtype)
        for number, param in enumerate(self.model.parameters()):
            param.register_post_accumulate_grad_hook(lambda _, number=number: self.hold(number))
        self.optimizer = AdamW(self.model.parameters(), gradient_release=True, transfer="copy", **arguments)
        simulated.optimizer = self.optimizer

    def hold(self, layers: int) -> None:
        """Activations of so many layers."""
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.gpu.training = sum(p.nbytes for p in self.model.parameters()) + gradients
        self.gpu.forward(layers * MiB)

    def backward(self) -> None:
        self.hold(LAYERS)
        loss: Tensor = self.model(self.x).square().mean()
        loss.backward()

    def step(self, micro_batches: int = 1) -> None:
        with self.optimizer.accumulating():
            for _ in range(micro_batches - 1):
                self.backward()
        self.backward()
        self.optimizer.step()


@pytest.mark.parametrize(
    ("state", "expected"),
    [(5, "32bit"), (2, "8bit"), (0.5, "8bit, partly paged"), (0.3, "8bit, partly paged")],
)
def test_it_leaves_room_for_the_gradients_to_come(
    state: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``state``: MiB beside all else at its peak. An allocation that failed would raise."""
    monkeypatch.setattr(placement, "BUCKET_BYTES", BUCKET)
    monkeypatch.setattr(placement.live_bytes, "__defaults__", (BUCKET,))
    live = placement.live_bytes([WIDTH * WIDTH * 4] * LAYERS)
    total = WEIGHTS + LAYERS * MiB + 2 * live + int(state * MiB)
    simulated = SimulatedGpu(int(total / 0.98), 0)
    install(monkeypatch, simulated)
    training = Training(simulated)
    for _ in range(3):
        training.step()
    plan = training.optimizer.plan
    assert plan is not None
    assert plan.chosen is not None
    assert plan.chosen.name == expected
    assert dict(plan.limits[0].spent)["gradients to come"] == live
    assert simulated.retries == 0


@pytest.mark.parametrize(
    ("where", "micro_batches", "expected"),
    [("gpu", 1, "exact"), ("host", 1, "stochastic"), ("host", 4, "exact")],
)
def test_it_leaves_room_on_the_host_for_sums(
    where: str, micro_batches: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are still to come: what is there already is in what the host has left. (This one always has
    room for paged state with exact weights, and for nothing more.)"""
    monkeypatch.setattr(placement, "BUCKET_BYTES", BUCKET)
    monkeypatch.setattr(placement.live_bytes, "__defaults__", (BUCKET,))
    numel = LAYERS * WIDTH * WIDTH
    live = placement.live_bytes([WIDTH * WIDTH * 2] * LAYERS)
    total = 2 * numel + LAYERS * MiB + 2 * live + (768 << 10)
    simulated = SimulatedGpu(int(total / 0.98), 0)
    install(monkeypatch, simulated, host=int(4.05 * numel))
    training = Training(simulated, torch.bfloat16, accumulate_on=where)
    for _ in range(3):
        training.step(micro_batches)
    plan = training.optimizer.plan
    assert plan is not None
    assert plan.chosen is not None
    assert (plan.chosen.bits, plan.chosen.paged, plan.chosen.weights) == (8, True, expected)
    sums = 2 * numel if (where, micro_batches) == ("host", 1) else 0
    assert plan.candidates[0].host_bytes == sums
    assert training.optimizer.memory().get("sums", 0) == (2 * numel if micro_batches > 1 else 0)
    assert simulated.retries == 0
