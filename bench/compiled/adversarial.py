"""Extreme inputs: where the compiled kernel differs from the specification, and whether the known cause
explains it, subnormal v: the compiled square roots have .ftz, so v below 2**-126 counts as zero.

The cause is decided from the exact numbers of an element, never from what the kernel gave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamw_triton_kernels import codes, reference
from bench.compiled.comparison import LIMITS, distance
from bench.compiled.extremes import adversarial_8bit, adversarial_32bit
from bench.compiled.problems import Kernel, Problem

SMALLEST_NORMAL = 2.0**-126
CAUSE = "subnormal v"


def new_v(before: Problem) -> Tensor:
    """Of the only tensor after the step, by the specification, before any encoding."""
    kernel, n = before.kernel, before.layout.numels[0]
    state = {name: before.of_tensors(array, before.per(name)) for name, array in before.state.items()}
    if kernel.block:
        m, v = codes.decode_8bit(state, kernel.block)
    else:
        m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    reference._new_moments(m, v, before.grads[0].clone(), reference.Row.of_all(before.hyper)[0])
    if kernel.amsgrad:
        v = torch.maximum(state["max_exp_avg_sq"], v)
    return v[:n]


def check_adversarial(
    capability: int,
    kernel: Kernel,
    param: torch.dtype,
    grad: torch.dtype,
    eps: float,
    step: int,
    flush: bool = True,
) -> tuple[list[str], dict[str, int], dict[str, str]]:
    """What the cause does not explain; of how many elements of each array it does, and an example of each.

    Without ``flush``, the kernel runs as if no instruction had .ftz: then subnormal v explains nothing.
    """
    make = adversarial_8bit if kernel.block else adversarial_32bit
    expected = make(kernel, param, grad, eps, step)
    before, ours = expected.copy(), expected.copy()
    expected.step_in_torch()
    ours.step_compiled(capability, flush=flush)
    problems: list[str] = []
    if not ours.untouched(before):
        problems.append("memory outside the tensors has changed")
    if not ours.settled():
        problems.append("weights are not the rounding of what is kept exactly")
    v = new_v(before)
    subnormal = (v > 0) & (v < SMALLEST_NORMAL)
    slack = torch.zeros(before.layout.numels)
    if not flush:
        # But a weight feels the rounding of such a v, of which one ulp is more than one of a float.
        slack[subnormal] = SMALLEST_NORMAL / v[subnormal]
    explained: dict[str, int] = {}
    examples: dict[str, str] = {}
    label = f"adversarial eps={eps:g} step {step}"
    for name, (far, limit) in _differences(before, ours, expected).items():
        bad = far > (limit + slack if name == "weight" else limit)
        if name in ("exp_avg_codes", "exp_avg_scales"):
            bad &= _comparable(name, ours, expected)
        at_work = bad & (_any_of_block(subnormal, kernel.block) if name.endswith("scales") else subnormal)
        if flush and at_work.any():
            explained[f"{name}: {CAUSE}"] = int(at_work.sum())
            examples[f"{name}: {CAUSE}"] = describe(int(at_work.nonzero()[0]), name, before, ours, expected)
            bad &= ~at_work
        if bad.any():
            example = describe(int(bad.nonzero()[0]), name, before, ours, expected)
            problems.append(f"{label}: {name}: {int(bad.sum())} of {len(far)} differ, e.g. {example}")
    return problems, explained, examples


def _differences(before: Problem, ours: Problem, expected: Problem) -> dict[str, tuple[Tensor, float]]:
    """Of weights and each state array: how far apart, and how far they may be."""
    kernel = before.kernel
    p, q, old = (problem.weights() for problem in (ours, expected, before))
    change = 2 * (q.float() - old.float())
    limit = LIMITS["weight"] if p.dtype == torch.float32 else 1.0
    found = {"weight": (distance(p, q, old, change), limit)}
    g = expected.grads[0].float() * expected.hyper[0, 0]
    for name in kernel.moments:
        a, b, o = (p.of_tensors(p.state[name], p.per(name)) for p in (ours, expected, before))
        if name.endswith("codes"):
            found[name] = (a.float() - b.float()).abs().double(), 1.0
        elif kernel.block:
            found[name] = distance(a, b), 1.0
        else:
            found[name] = distance(a, b, o, g if name == "exp_avg" else g * g), LIMITS["state"]
    return found


def _comparable(name: str, ours: Problem, expected: Problem) -> Tensor:
    """m is stored relative to the decoded v: only blocks whose codes of v are the same can be compared."""
    a, b = (p.of_tensors(p.state["exp_avg_sq_codes"]) for p in (ours, expected))
    block = ours.kernel.block
    same = ~_any_of_block(a != b, block)
    return same if name.endswith("scales") else same.repeat_interleave(block)[: len(a)]


def _any_of_block(where: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(where, (0, -len(where) % block)).view(-1, block).any(1)


def describe(at: int, name: str, before: Problem, ours: Problem, theirs: Problem) -> str:
    """All that went into an element, or of scales into a block, and what came out."""
    block = before.kernel.block
    element = at * block if name.endswith("scales") else at
    given = {"p": before.weights()[element], "g": before.grads[0][element]}
    if name.endswith("scales"):
        given["largest |g| of the block"] = before.grads[0][element : element + block].abs().max()
    for key, array in before.state.items():
        given[key] = array[element // before.per(key)]
    a, b = ((p.weights() if name == "weight" else p.state[name])[at] for p in (ours, theirs))
    inputs = ", ".join(f"{key}={float(value):g}" for key, value in given.items())
    return f"[{at}] {inputs}: compiled {float(a):g}, reference {float(b):g}"
