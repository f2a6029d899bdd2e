"""accelerate: preparing, accumulating, saving and loading, and steps that a gradient scaler skips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn
from torch.utils.data import DataLoader

import adamw_triton
from tests.huggingface.tiny import VARIANTS, bits, is_paged, llama, state_bits, tokens

variants = pytest.mark.parametrize("variant", VARIANTS.values())


def prepared(variant: str, seed: int, accumulate: int = 1) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = llama(seed)
    optimizer = adamw_triton.AdamW(model.parameters(), lr=3e-3, variant=variant)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def train(parts: tuple[Accelerator, Any, Any, Any], first: int, last: int) -> None:
    accelerator, model, optimizer, scheduler = parts
    batches = list(DataLoader(tokens(), batch_size=4))
    for batch in batches[first:last]:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@variants
def test_saved_and_loaded_it_goes_on_with_the_same_bits(variant: str, tmp_path: Path) -> None:
    whole = prepared(variant, seed=0)
    train(whole, 0, 3)
    whole[0].save_state(str(tmp_path / "state"))
    train(whole, 3, 6)
    resumed = prepared(variant, seed=1)
    resumed[0].load_state(str(tmp_path / "state"))
    train(resumed, 3, 6)
    assert bits(resumed[1]) == bits(whole[1])
    assert state_bits(resumed[2].optimizer) == state_bits(whole[2].optimizer)
    assert is_paged(resumed[2].optimizer) == variant.startswith("paged")


def test_accumulating_steps_once_for_several_batches() -> None:
    parts = prepared("8bit", seed=0, accumulate=3)
    before = bits(parts[1])
    train(parts, 0, 2)
    assert bits(parts[1]) == before
    train(parts, 2, 3)
    assert bits(parts[1]) != before
    assert {float(entry["step"]) for entry in parts[2].state.values()} == {1.0}


# --- Gradient scaling --------------------------------------------------------------------------------


def scaled(kind: str) -> tuple[nn.Module, AcceleratedOptimizer, AcceleratedScheduler, Any]:
    """As ``Accelerator(mixed_precision="fp16")`` puts them together where there is a GPU."""
    Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(80, 80)
    optimizer: torch.optim.Optimizer
    if kind == "torch":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=False)
    else:
        optimizer = adamw_triton.AdamW(model.parameters(), lr=0.1, variant=kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    return model, wrapped, AcceleratedScheduler(scheduler, wrapped, split_batches=True), scaler


def scaled_steps(kind: str) -> list[tuple[float, bool, float, bytes]]:
    """Four steps, the second of which overflows: after each the scale, whether it was skipped, the
    learning rate, and for ours the weights."""
    model, optimizer, scheduler, scaler = scaled(kind)
    inputs = torch.randn(4, 80, generator=torch.Generator().manual_seed(0))
    seen = []
    for step in range(4):
        loss = model(inputs).square().mean() * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rate = optimizer.param_groups[0]["lr"]
        seen.append((scaler.get_scale(), optimizer.step_was_skipped, rate, bits(model)["weight"]))
    return seen


@variants
def test_an_overflow_is_skipped_as_with_torchs_adamw(variant: str) -> None:
    ours, theirs = scaled_steps(variant), scaled_steps("torch")
    assert [step[:3] for step in ours] == [step[:3] for step in theirs]
    scales, skipped, rates, weights = zip(*ours, strict=True)
    assert skipped == (False, True, False, False)
    assert scales == (1024.0, 512.0, 512.0, 512.0)
    assert rates == (0.05, 0.05, 0.025, 0.0125)
    assert weights[1] == weights[0] != weights[2]


@variants
def test_a_plain_scaler_too(variant: str) -> None:
    model = nn.Linear(80, 80)
    optimizer = adamw_triton.AdamW(model.parameters(), lr=0.1, variant=variant)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = bits(model)
    scaler.scale(model(torch.ones(1, 80)).sum() * float("nan")).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert bits(model) == before
    assert not optimizer.state
    assert scaler.get_scale() == 512.0
