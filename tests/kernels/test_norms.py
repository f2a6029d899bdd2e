"""The norm of all gradients, and what is made of it: Triton, interpreted and compiled, beside plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from adamw_triton_kernels import Verdict, norms
from adamw_triton_kernels.work import SKIP, WARM_UP, Adapting
from tests.compiling import in_compiling_process

CPU = torch.device("cpu")
NUMELS = (1, 31, 2048, 0, 9001, 127)
TARGETS = (75, 80, 86, 89, 90, 100, 120)
MAGNITUDES = {
    torch.float32: (0.0, 1e-30, 1.0, 1e30, 1e36),
    torch.bfloat16: (1e-30, 1.0, 1e30),
    torch.float16: (1e-4, 1.0, 1e3),
}


def gradients(dtype: torch.dtype, magnitude: float, shift: int = 0) -> list[Tensor]:
    """``shift``: elements by which each begins after its memory."""
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(n + shift, generator=generator, dtype=torch.float64) * magnitude for n in NUMELS]
    return [each.to(dtype)[shift:] for each in made]


def mixed(shift: int = 0) -> list[Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [gradients(dtypes[i % 3], 1.0, shift * (i % 2))[i] for i in range(len(NUMELS))]


def truth(grads: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(grad.double())) for grad in grads))


def judged(module: Any, grads: Sequence[Tensor], given: Verdict) -> tuple[float, float]:
    """Factor and norm."""
    found = module.Norms([grad.numel() for grad in grads], CPU).of(grads)
    factor, norm = module.verdict(found, given).tolist()
    return factor, norm


def check_norms(module: ModuleType) -> None:
    cases = [
        gradients(dtype, magnitude, shift)
        for dtype, magnitudes in MAGNITUDES.items()
        for magnitude in magnitudes
        for shift in (0, 1)
    ]
    for grads in (*cases, mixed(), mixed(1)):
        norm = truth(grads)
        for scale in (None, torch.tensor([4.0])):
            factor, found = judged(module, grads, Verdict(2.0, scale, None))
            unscaled = norm / (1 if scale is None else 4)
            assert found == pytest.approx(unscaled, rel=1e-6), (grads[0].dtype, norm)
            assert factor == pytest.approx(min(1.0, 2.0 / (unscaled + 1e-6)), rel=1e-6, abs=1e-37)


def check_bad(module: ModuleType) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for tensor, element in ((0, 0), (2, 2047), (4, 0), (4, 4096), (4, 9000), (5, 126)):
            grads = gradients(torch.bfloat16, 1.0)
            grads[tensor][element] = bad
            skipped = torch.tensor([2.0])
            factor, norm = judged(module, grads, Verdict(2.0, None, skipped))
            assert (factor, float(skipped)) == (SKIP, 3)
            assert not math.isfinite(norm)
            factor, _ = judged(module, grads, Verdict(2.0, None, None))
            assert math.isnan(factor) if math.isnan(bad) else factor == 0  # as clip_grad_norm_
            assert judged(module, grads, Verdict(None, None, None))[0] == 1
    skipped = torch.zeros(1)
    assert judged(module, gradients(torch.bfloat16, 1e30), Verdict(None, None, skipped))[0] == 1
    assert float(skipped) == 0


def check_adapting(module: ModuleType) -> None:
    """Every phase, average and kind of norm, beside plain torch."""
    for outcome in (1.0, 0.25, SKIP, math.nan):
        for scale in (None, torch.tensor([4.0])):
            for magnitude in (0.0, 1.0, math.inf):
                grads = [*mixed(), *mixed()]
                if magnitude != 1:
                    grads[4] = grads[4] * magnitude
                steps = torch.tensor([0.0, WARM_UP - 1, WARM_UP] * 4)
                averages = torch.tensor([math.inf, 1e-3, 1.0, 300.0] * 3)
                pairs = list(zip(steps, averages, strict=True))
                results = []
                for each in (module, norms):
                    found = each.Norms([grad.numel() for grad in grads], CPU, pairs)
                    results.append(
                        found.adapt(found.of(grads), torch.tensor([outcome, 0.0]), Adapting(1.05, scale))
                    )
                for ours, theirs in zip(*results, strict=True):
                    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)
                assert not results[0][1].isnan().any()


CHECKS = (check_norms, check_bad, check_adapting)


@pytest.mark.parametrize("check", CHECKS[:2])
def test_plain_torch(check: Any) -> None:
    check(norms)


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check: Any) -> None:
    from adamw_triton_kernels import norm_kernels

    check(norm_kernels)


def compiled_for(capability: int, number: int) -> None:
    from adamw_triton_kernels import norm_kernels
    from bench.compiled.session import compiled

    with compiled(capability, races=True) as session:
        CHECKS[number](norm_kernels)
    assert not [kind for kind in session.conflicts() if "harmless" not in kind]


def no_spills(capability: int) -> list[str]:
    """Registers and spills of all builds."""
    from adamw_triton_kernels import norm_kernels
    from bench.machine_code.account import account, compile_for

    builds = [
        *(norm_kernels.build(dtype, aligned) for dtype in MAGNITUDES for aligned in (True, False)),
        norm_kernels.verdict_build(True, True, True),
        norm_kernels.adapting_build(True),
    ]
    found = []
    for build in builds:
        made = compile_for(
            build.fn, build.signature, build.constexprs, build.attrs, f"sm_{capability}", **build.options(32)
        )
        counted = account(made, build.tile)
        if counted.spills or counted.stack_bytes:
            found.append(f"{build.fn.__name__} {build.constexprs}: {counted.spills}")
    return found


@pytest.mark.parametrize("number", range(len(CHECKS)))
@pytest.mark.parametrize(
    "capability",
    [pytest.param(each, marks=[] if each in (75, 90) else pytest.mark.slow) for each in TARGETS],
)
def test_compiled(capability: int, number: int) -> None:
    in_compiling_process(compiled_for, capability, number)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
def test_no_build_spills(capability: int) -> None:
    assert in_compiling_process(no_spills, capability) == []


def test_the_same_bits_every_time() -> None:
    grads = mixed()
    from adamw_triton_kernels import norm_kernels

    for module in (norms, norm_kernels):
        assert judged(module, grads, Verdict(1.0, None, None)) == judged(
            module, [grad.clone() for grad in grads], Verdict(1.0, None, None)
        )
