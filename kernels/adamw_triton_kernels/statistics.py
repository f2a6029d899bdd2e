"""What an update leaves of itself for statistics: sums over the elements of each tensor, and here in plain
torch. In Triton: ``statistic_kernels.py``.

Of each tensor a row of ``WIDTH`` fp32 numbers. They are added up, but for the last two, of which the largest
counts; so whatever a tensor is cut into, chunks, pages or shards, its row is made of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton_kernels.runs import Run, Span
from adamw_triton_kernels.tables import has_float64
from adamw_triton_kernels.work import SKIP, Layout

SUMS = (
    "gradient",  # g*g, of what the update takes: unscaled, clipped
    "weight",  # p*p, before
    "change",  # the square of m/(sqrt(v)+eps) + decay*p: times the step size, what is taken from p
    "exp_avg",  # m*m, after
    "exp_avg_sq",  # v, after
    "lost",  # p is what it was, though neither the change nor the step size is 0
    "nan",  # of gradients
    "inf",
    # Of 8-bit state, of the elements whose index in the parameter divides by SAMPLED:
    "top",  # v's codes that are 255
    "bottom",  # 1
    "stalled",  # what they were, though v has changed
    "zero",  # m's codes that are 0
)
LARGEST = ("exp_avg_sq_max", "factor")  # NaN takes no part
COLUMN = {name: column for column, name in enumerate((*SUMS, *LARGEST))}
WIDTH = 16
"""Columns of a row; what is beyond the names is unused."""
SAMPLED = 16
"""One code in so many is looked at: of all, it would be more work than all the rest."""


class Codes(NamedTuple):
    """Of 8-bit state, before and after."""

    root_v: Tensor
    new_root_v: Tensor
    q: Tensor
    new_q: Tensor
    new_r: Tensor


class Tally:
    """Of one call: adds what its runs have done to the rows of ``sums`` that its layout names."""

    def __init__(self, sums: Tensor, layout: Layout, factors: Tensor | None) -> None:
        self._sums = sums
        self._rows = torch.tensor(layout.sums, device=sums.device)
        self._exact = torch.float64 if has_float64(sums.device) else torch.float32
        own = torch.ones(len(layout.sums), device=sums.device)
        if factors is not None:
            own = factors[list(layout.factors)] if layout.factors else own * factors[0]
        self._factors = own

    def add(
        self,
        run: Run,
        gradient: Tensor,
        before: Tensor,
        after: Tensor,
        change: Tensor,
        step_size: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        codes: Codes | None = None,
    ) -> None:
        """Of one run, fp32, flat; ``before`` and ``after``: the weight, as exactly as it is kept."""
        lost = (after == before) & (change != 0) & (step_size != 0)
        columns = [
            *(each * each for each in (gradient, before, change, exp_avg)),
            exp_avg_sq,
            lost,
            gradient.isnan(),
            gradient.isinf(),
        ]
        self._put(run.spans, columns, torch.where(exp_avg_sq == exp_avg_sq, exp_avg_sq, 0.0))
        if codes is not None:
            at, spans = _sampled(run.spans, gradient.device)
            root_v, new_root_v, q, new_q, new_r = (each[at] for each in codes)
            stalled = (q == new_q) & (root_v != new_root_v)
            self._put(spans, [new_q == 255, new_q == 1, stalled, new_r == 0], None, begin=COLUMN["top"])

    def skipped(self, grads: Sequence[Tensor], grad_scales: Tensor) -> None:
        """Of a step that leaves all as it is: of gradients there is something to say, too."""
        for index, (grad, scale) in enumerate(zip(grads, grad_scales, strict=True)):
            g = grad.detach().float().flatten() * scale
            self._put([Span(index, g.numel(), 0)], [g * g], None)
            self._put([Span(index, g.numel(), 0)], [g.isnan(), g.isinf()], None, begin=COLUMN["nan"])

    def _put(
        self, spans: Sequence[Span], columns: Sequence[Tensor], peaks: Tensor | None, begin: int = 0
    ) -> None:
        """Columns from ``begin`` on, of these elements."""
        tensors = [span.tensor for span in spans]
        rows = self._rows[tensors]
        if len(spans) == 1:
            found = torch.stack([column.sum(dtype=self._exact) for column in columns])[None]
            highest = None if peaks is None else peaks.amax()[None]
        else:
            sizes = torch.tensor([span.numel for span in spans], device=rows.device)
            which = torch.repeat_interleave(torch.arange(len(spans), device=rows.device), sizes)
            each = torch.stack([column.to(self._exact) for column in columns], dim=1)
            found = each.new_zeros((len(spans), len(columns))).index_add_(0, which, each)
            highest = None
            if peaks is not None:
                highest = peaks.new_zeros(len(spans)).scatter_reduce_(0, which, peaks, "amax")
        self._sums[rows, begin : begin + len(columns)] += found.float()
        if highest is not None:
            column = COLUMN["exp_avg_sq_max"]
            self._sums[rows, column] = torch.maximum(self._sums[rows, column], highest)
        self._sums[rows, COLUMN["factor"]] = self._factors[tensors]


def skips(factors: Tensor | None) -> bool:
    return factors is not None and bool((factors == SKIP).any())


def _sampled(spans: Sequence[Span], device: torch.device) -> tuple[Tensor, list[Span]]:
    """Where in a run the elements are that are looked at, and the spans of these."""
    places, found, begin = [], [], 0
    for span in spans:
        places.append(torch.arange(begin, begin + span.numel, SAMPLED, device=device))
        found.append(Span(span.tensor, len(places[-1]), 0))
        begin += span.numel
    return torch.cat(places), found
