"""Clipping and skipping on a real GPU: torch's norm, and no wait for the GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from tests.optimizer.problems import bits, copies, set_grads, state_bits

pytestmark = pytest.mark.gpu
VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")


def problem(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1,), (31,), (300, 700), (1 << 20,))
    return [Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in shapes]


def refill(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    there = [torch.empty(p.shape, dtype=p.dtype) for p in params]
    set_grads(there, step, scale)
    for p, other in zip(params, there, strict=True):
        p.grad = other.grad.cuda()  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_as_clip_grad_norm(scale: float) -> None:
    params = problem(torch.float32)
    others = copies(params)
    ours = AdamW(params, lr=0.1, variant="32bit", max_grad_norm=1.0)
    plain = torch.optim.AdamW(others, lr=0.1, fused=True)
    for step in range(1, 4):
        refill(params, step, scale)
        refill(others, step, scale)
        norm = torch.nn.utils.clip_grad_norm_(others, 1.0)
        ours.step()
        plain.step()
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-5, atol=0.0)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptive", [None, 1.05])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_step_never_was_and_nobody_waits(variant: str, adaptive: float | None) -> None:
    trained = []
    for sees_bad in (False, True):
        params = problem(torch.bfloat16)
        optimizer = AdamW(
            params, variant=variant, nonfinite="skip", max_grad_norm=1.0, adaptive_clip=adaptive,
            master_weights=True, transfer="copy" if "paged" in variant else "auto",
        )  # fmt: skip
        for step in range(1, 5):
            if sees_bad and step > 1:
                refill(params, 100 + step)
                params[3].grad[-1] = math.nan  # type: ignore[index]
                optimizer.step()
            refill(params, step)
            torch.cuda.synchronize()
            # The first steps allocate and measure.
            mode = "error" if step > 2 else "default"
            torch.cuda.set_sync_debug_mode(mode)
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert optimizer.skipped_steps == (3 if sees_bad else 0)
        trained.append((bits(params), state_bits(optimizer)))
    assert trained[0] == trained[1]
