"""Real trainings: seven sick ones are named within 20 steps, and healthy ones are called so at every step.

``ADAMW_TRITON_STEPS`` in the environment: the healthy ones take 300 steps, the demo at its real width.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import nn

from adamw_triton import AdamW
from tests.telemetry.runs import Run, adapted, demo_schedule

BEGIN = 12
WITHIN = 20
THOROUGH = "ADAMW_TRITON_STEPS" in os.environ
STEPS = 300 if THOROUGH else 60


def dies(step: int, model: nn.Module) -> None:
    """No input activates the middle layer's MLP, as of ReLUs behind a bias that is far too low."""
    if step == 1:
        model.blocks[1].mlp[1] = nn.ReLU()
    if step == BEGIN:
        with torch.no_grad():
            model.blocks[1].mlp[0].bias.fill_(-1e4)


def nan_batch(step: int, model: nn.Module) -> None:
    if step == BEGIN:
        model.head.weight.register_hook(lambda grad: grad * torch.nan)


def freezes(step: int, model: nn.Module) -> None:
    model.blocks[1].requires_grad_(step < BEGIN)


def left_frozen(step: int, model: nn.Module) -> None:
    """When all others had been thawed."""
    model.blocks[1].requires_grad_(False)


BF16 = torch.bfloat16


class Sick(NamedTuple):
    kind: str
    run: Run
    begin: int = BEGIN
    tensors: str = ""
    """What all that are named begin with."""


SICK = {
    "lr 100x too high": Sick("lr_high", Run(schedule=lambda step: 100.0 if step >= BEGIN else 1.0)),
    "lr 100x too high from the start": Sick("lr_high", Run(schedule=lambda step: 100.0), 1),
    "lr too low in bf16": Sick("lost_updates", Run(lr=3e-5, dtype=BF16), 1),
    "all updates lost": Sick("all_lost", Run(lr=1e-8, dtype=BF16), 1),
    "dead layer": Sick("dead", Run(before=dies), tensors="blocks.1.mlp"),
    "NaN batch": Sick("nonfinite", Run(before=nan_batch), tensors="head.weight"),
    "decay 10 instead of 0.1": Sick("decay_strong", Run(weight_decay=lambda s: 10.0 if s >= BEGIN else 0.1)),
    "a layer is frozen": Sick("frozen", Run(before=freezes), tensors="blocks.1."),
    "a layer left frozen": Sick("frozen", Run(before=left_frozen), 1, "blocks.1."),
}


@pytest.mark.parametrize("name", SICK)
def test_sick(name: str) -> None:
    kind, run, begin, tensors = SICK[name]
    for step, report in run.reports(begin + WITHIN - 1):
        assert step >= begin or report.healthy, str(report)
    assert [finding.kind for finding in report.findings] == [kind], str(report)
    assert all(each.startswith(tensors) for each in report.findings[0].tensors)
    assert abs(report.findings[0].step - begin) <= 1


HEALTHY = {
    "demo": Run(schedule=demo_schedule(STEPS), width=128 if THOROUGH else 32),
    "LoRA": Run(lr=1e-3, made=adapted, weight_decay=lambda step: 0.0),
    "warm-up": Run(schedule=lambda step: min(1.0, step / 200), weight_decay=lambda step: 0.1),
    "tiny steps of exact weights": Run(lr=1e-6, dtype=BF16),
}
ARGUMENTS = {"tiny steps of exact weights": {"master_weights": True}}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(name: str) -> None:
    for _, report in HEALTHY[name].reports(STEPS, **ARGUMENTS.get(name, {})):
        assert report.healthy, str(report)


@pytest.mark.parametrize(
    ("name", "decades", "coarse"),
    [("layers.0.weight", 2, False), ("layers.0.weight", 20, True), ("embedding.weight", 20, False)],
)
def test_8_bits_for_gradients_of_many_magnitudes(name: str, decades: float, coarse: bool) -> None:
    """In one block, as they rarely are."""
    weight = torch.nn.Parameter(torch.randn(8192))
    optimizer = AdamW([(name, weight)], variant="8bit", telemetry=True)
    magnitudes = 10 ** (-decades * torch.rand(8192))
    for _ in range(12):
        weight.grad = torch.randn(8192) * magnitudes
        optimizer.step()
    report = optimizer.diagnose()
    assert [finding.kind for finding in report.findings] == ["code_floor"] * coarse, str(report)
