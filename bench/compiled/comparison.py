"""How far what a compiled kernel made is from its specification, and how far it may be."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adamw_triton_kernels import codes
from adamw_triton_kernels.statistics import COLUMN
from bench.compiled.problems import Problem

LIMITS = {"state": 4.0, "weight": 8.0}
"""Ulps, as tests/kernels/test_against_reference.py allows a GPU."""
SHARE = 1e-3
"""Of codes, and of 16-bit weights, that may be rounded the other way."""


@dataclass
class Report:
    """What one case showed: the worst of each figure, and disagreements in words."""

    figures: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """Kind -> example: races that are none, and differences on extreme inputs of which the cause is known."""
    explained: Counter[str] = field(default_factory=Counter)
    """Kind of difference with a known cause -> elements."""
    opcodes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def worst(self, name: str, value: float) -> None:
        self.figures[name] = max(self.figures.get(name, 0.0), value)

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            self.problems.append(message)


def distance(actual: Tensor, expected: Tensor, *took_part: Tensor) -> Tensor:
    """In ulps of the largest magnitude that took part; 0 where both are the same or both NaN, infinite
    where one is not finite and the other differs from it."""
    dtype = actual.dtype
    size = torch.stack([t.float().abs().nan_to_num(0.0, 0.0, 0.0) for t in (expected, *took_part)]).amax(0)
    exponent = torch.frexp(size).exponent.double()
    ulp = torch.exp2(exponent - 1) * torch.finfo(dtype).eps
    ulp = ulp.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    apart = (actual.double() - expected.double()).abs() / ulp
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    apart[~same & ~(actual.isfinite() & expected.isfinite())] = float("inf")
    apart[same] = 0
    return apart


def compare(ours: Problem, theirs: Problem, before: Problem, report: Report, label: str) -> None:
    """After one step from the same state."""
    hyper = theirs.hyper
    scale = torch.cat(
        [hyper[row, 0].expand(n) for row, n in zip(theirs.layout.rows, theirs.layout.numels, strict=True)]
    )
    if theirs.factors is not None:
        factors = theirs.factors[list(theirs.layout.factors)].tolist()
        scale *= torch.cat([torch.full((n,), x) for x, n in zip(factors, theirs.layout.numels, strict=True)])
    g = torch.cat([grad.float() for grad in theirs.grads]) * scale
    p, q, old = (problem.weights() for problem in (ours, theirs, before))
    change = 2 * (q.float() - old.float()) * _cancelled(before, hyper, g)
    apart = distance(p, q, old, change)
    report.worst(f"{label}: weight, ulps", float(apart.max()))
    if p.dtype == torch.float32:
        report.require(
            float(apart.max()) <= LIMITS["weight"], f"{label}: weights {float(apart.max()):.1f} ulps apart"
        )
    if theirs.params[0].dtype != torch.float32:
        apart = distance(*(torch.cat(problem.params) for problem in (ours, theirs)), old, change)
        share = float((apart > 0).float().mean())
        report.worst(f"{label}: weights rounded the other way", share)
        report.require(
            float(apart.max()) <= 1 and share <= SHARE,
            f"{label}: weights {float(apart.max())} ulps, {share:.2%}",
        )
    report.require(ours.settled(), f"{label}: weights are not the rounding of what is kept exactly")
    if theirs.kernel.block:
        compare_codes(ours, theirs, report, label)
        return
    took_part = {"exp_avg": g, "exp_avg_sq": g * g, "max_exp_avg_sq": g * g}
    for name in theirs.kernel.moments:
        a, b, o = (problem.of_tensors(problem.state[name]) for problem in (ours, theirs, before))
        apart = distance(a, b, o, took_part[name])
        report.worst(f"{label}: {name}, ulps", float(apart.max()))
        report.require(
            float(apart.max()) <= LIMITS["state"], f"{label}: {name} {float(apart.max()):.1f} ulps apart"
        )


def _cancelled(before: Problem, hyper: Tensor, g: Tensor) -> Tensor:
    """How many times larger than their sum the two terms of m are: so many more of its last bits are lost."""
    block = before.kernel.block
    m = before.of_tensors(codes.decode_8bit(before.state, block)[0] if block else before.state["exp_avg"])
    gaps = torch.cat(
        [hyper[row, 1].expand(n) for row, n in zip(before.layout.rows, before.layout.numels, strict=True)]
    )
    beta = torch.where(gaps.signbit(), -gaps, 1 - gaps)
    terms = beta * m, (1 - beta) * g
    return (sum(abs(term) for term in terms) / sum(terms).abs()).nan_to_num(1.0, 1.0)  # type: ignore[union-attr]


def compare_codes(ours: Problem, theirs: Problem, report: Report, label: str) -> None:
    block = theirs.kernel.block
    whole = {name: (ours.state[name].float(), theirs.state[name].float()) for name in theirs.state}
    apart_of = {
        name: (a - b).abs().view(-1, block) for name, (a, b) in whole.items() if name.endswith("codes")
    }
    # m is stored relative to the decoded v: where a code of v differs, its block's m may.
    comparable = apart_of["exp_avg_sq_codes"].amax(1) == 0
    report.require(bool(comparable.any()), f"{label}: some code of v differs in every block")
    for name, apart in apart_of.items():
        rows = comparable if name == "exp_avg_codes" else slice(None)
        by, share = _largest(apart[rows]), float((apart != 0).float().mean())
        report.worst(f"{label}: {name} that differ", share)
        report.worst(f"{label}: {name}, by", by)
        report.require(by <= 1 and share <= SHARE, f"{label}: {name} {by:g} apart, {share:.3%} differ")
    for name in ("exp_avg_sq_scales", "exp_avg_scales"):
        rows = comparable if name == "exp_avg_scales" else slice(None)
        a, b = (array[rows] for array in (ours.state[name], theirs.state[name]))
        by = _largest(distance(a, b))
        report.worst(f"{label}: {name} that differ", int((a != b).sum()) / max(1, len(a)))
        report.require(by <= 1, f"{label}: {name} {by} ulps apart")


def compare_sums(ours: Problem, theirs: Problem, report: Report, label: str) -> None:
    """Of two steps with statistics. Counts of what may be rounded the other way may be so by as many."""
    if ours.sums is None or theirs.sums is None:
        raise ValueError("neither problem leaves statistics without tell()")
    a, b = (problem.sums[:, : len(COLUMN)].double() for problem in (ours, theirs))
    rows = list(theirs.layout.sums)
    may = torch.zeros_like(b)
    may[rows] = 1 + SHARE * torch.tensor(theirs.layout.numels, dtype=torch.float64)[:, None]
    rounded = torch.tensor([name in _ROUNDED for name in COLUMN])
    apart = (a - b).abs() / torch.where(rounded, may, b.abs().clamp(min=1e-30))
    apart[(a == b) | (a.isnan() & b.isnan())] = 0
    for name, column in COLUMN.items():
        by, limit = float(apart[:, column].nan_to_num(math.inf).max()), 1 if name in _ROUNDED else TOLD
        if name not in _ROUNDED:
            report.worst("sums, relative", by)
        report.require(by <= limit, f"{label}: sum of {name} {by:.1e} apart")


TOLD = 1e-5
"""Of sums, relative."""
_ROUNDED = ("lost", "top", "bottom", "stalled", "zero")


def _largest(numbers: Tensor) -> float:
    return float(numbers.max()) if numbers.numel() else 0.0
