"""Training steps under ``torch.compile``: ours is a graph break, and gives the bits it gives without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adamw_triton

VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")


def losses(variant: str, compiled: bool) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    optimizer = adamw_triton.AdamW(model.parameters(), lr=1e-2, variant=variant)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def step() -> Any:
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    # "aot_eager" traces as inductor does, and leaves the arithmetic of the model as it is.
    run = torch.compile(step, backend="aot_eager") if compiled else step
    found = []
    for _ in range(4):
        found.append(run().item())
        scheduler.step()
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_compiled_step_has_the_same_bits(variant: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = losses(variant, compiled=True)
    assert compiled == losses(variant, compiled=False)
    assert compiled[-1] < compiled[0] / 2
    # The optimizer was not taken apart: two graphs, the loss and its gradient.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_a_trainer_that_compiles_its_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tests.huggingface import tiny

    args = tiny.arguments(
        tmp_path, "paged_adamw_triton_8bit", torch_compile=True, torch_compile_backend="aot_eager"
    )
    trained = tiny.trainer(args, tiny.llama())
    trained.train()
    assert tiny.losses(trained)[-1] < tiny.losses(trained)[0] - 0.3
