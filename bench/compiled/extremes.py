"""Zeros, NaN, infinities, subnormals and huge numbers, in every combination."""

from __future__ import annotations

import itertools

import torch

from adamw_triton_kernels.work import REMAINDER
from bench.compiled.problems import Kernel, Problem, hypers

EXTREMES = (0.0, -0.0, 1e-45, -1e-40, 1.1e-38, 1.3e-38, 1e-30, -1e-20, 1e-12, 1e-8, -1.0, 300.0, 1e10, 1e18,
            -1e19, 1e30, 3e38, float("inf"), float("-inf"), float("nan"))  # fmt: skip
FEW = (0.0, -1.0, 1e-40, 1e30, float("inf"), float("nan"))
VARIANCES = sorted({abs(x) for x in EXTREMES if x == x})


def adversarial_32bit(
    kernel: Kernel, param_dtype: torch.dtype, grad_dtype: torch.dtype, eps: float, step: int
) -> Problem:
    """Every combination of extreme weights, gradients and moments, an element each."""
    table = torch.tensor(list(itertools.product(FEW, EXTREMES, (0.0, -1e-40, 1e-21, 1.0, 1e30), VARIANCES)))
    problem = Problem.of(kernel, param_dtype, grad_dtype, hypers(step, (eps, eps)), (len(table),), rows=1)
    p, g, m, v = table.unbind(1)
    problem.params[0].copy_(p)
    problem.grads[0].copy_(g)
    problem.state["exp_avg"][: len(p)] = m
    problem.state["exp_avg_sq"][: len(p)] = v
    if kernel.amsgrad:
        problem.state["max_exp_avg_sq"][: len(p)] = v[
            torch.randperm(len(v), generator=torch.Generator().manual_seed(3))
        ]
    keep(problem)
    return problem


def keep(problem: Problem) -> None:
    """What is kept of every other weight is anything: remainders of all bits, masters of other weights."""
    weights, generator = problem.kernel.weights, torch.Generator().manual_seed(5)
    if not problem.kernel.exact:
        return
    p, kept = problem.params[0].float(), problem.state[weights]
    kept[: len(p)] = 0 if weights == REMAINDER else p
    if weights == REMAINDER:
        anything = torch.randint(-(2**15), 2**15, p.shape, generator=generator).to(torch.int16)
    else:
        near = 1 + 1e-3 * torch.rand(p.shape, generator=generator)  # a few units in the last place at most
        anything = p * near
    kept[1 : len(p) : 2] = anything[1::2]


V_SCALES = (0.0, 9e-19, 1.2e-18, 1e-9, 1.0, 1e10, 1.7e19)
M_SCALES = (0.0, 1e-12, 1.0, 1e15)


def adversarial_8bit(
    kernel: Kernel, param_dtype: torch.dtype, grad_dtype: torch.dtype, eps: float, step: int
) -> Problem:
    """Every combination of extreme gradients and scales, a block each; a last block that is not whole."""
    block = kernel.block
    generator = torch.Generator().manual_seed(2)
    patterns = [torch.full((block,), x) for x in EXTREMES]
    for huge in (1e30, 3e38, float("inf"), float("nan"), 1.0, 1e-30):
        pattern = torch.randn(block, generator=generator) * 1e-10
        pattern[block // 3] = huge
        patterns.append(pattern)
    patterns.append(
        torch.randn(block, generator=generator) * 10 ** (40 * torch.rand(block, generator=generator) - 20)
    )
    cases = list(itertools.product(patterns, V_SCALES, M_SCALES))
    numel = len(cases) * block - 5
    problem = Problem.of(kernel, param_dtype, grad_dtype, hypers(step, (eps, eps)), (numel,), rows=1)
    problem.params[0].copy_(torch.randn(numel, generator=generator))
    problem.grads[0].copy_(torch.cat([pattern for pattern, _, _ in cases])[:numel])
    state = problem.state
    used = slice(0, len(cases))
    state["exp_avg_sq_scales"][used] = torch.tensor([v for _, v, _ in cases]).bfloat16()
    state["exp_avg_scales"][used] = torch.tensor([m for _, _, m in cases]).bfloat16()
    state["exp_avg_sq_codes"][:numel] = torch.randint(0, 256, (numel,), generator=generator).to(torch.uint8)
    state["exp_avg_codes"][:numel] = torch.randint(-127, 128, (numel,), generator=generator).to(torch.int8)
    keep(problem)
    return problem
