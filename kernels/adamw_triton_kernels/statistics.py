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

from adamw_triton_kernels.fusion import fused
from adamw_triton_kernels.runs import Run
from adamw_triton_kernels.work import SKIP, Layout

SUMS = (
    "gradient",  # g*g, unscaled, before the factor
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

    def __init__(self, sums: Tensor, layout: Layout, hyper: Tensor, factors: Tensor | None) -> None:
        self._sums = sums
        self._rows = layout.sums
        self._scales = hyper[list(layout.rows), 0]
        own = torch.ones(len(layout.sums), dtype=torch.float32, device=sums.device)
        if factors is not None:
            own = factors[list(layout.factors)] if layout.factors else own * factors[0]
        sums[list(layout.sums), COLUMN["factor"]] = own

    def add(
        self,
        run: Run,
        before: Tensor,
        after: Tensor,
        m: Tensor,
        v: Tensor,
        numbers: Sequence[Tensor],
        codes: Codes | None = None,
    ) -> None:
        """Of one run, flat.

        Args:
            before, after: the weight, as exactly as it is kept.
            m, v: fp32, the new ones.
            numbers: inv_root_correction2, eps, decay, step_size.
        """
        begin = 0
        for span in run.spans:
            here = slice(begin, begin + span.numel)
            begin = here.stop
            grad, scale = run.grad[here], self._scales[span.tensor]
            each = _seen(before[here], after[here], grad, m[here], v[here], scale, *numbers)
            if each.is_meta:  # a rehearsal
                continue
            row = self._sums[self._rows[span.tensor]]
            row[: len(each) - 1] += each[:-1]
            highest = row[COLUMN["exp_avg_sq_max"]]
            highest.copy_(torch.maximum(highest, each[-1]))
            if not each[0].isfinite():
                _count_nonfinite(row, grad)
            if codes is not None:
                looked_at = slice(here.start, here.stop, SAMPLED)
                row[COLUMN["top"] : COLUMN["zero"] + 1] += _codes_seen(*(each[looked_at] for each in codes))

    def skipped(self, grads: Sequence[Tensor]) -> None:
        """Of a step that leaves all as it is: of gradients there is something to say, too."""
        for index, grad, scale in zip(self._rows, grads, self._scales, strict=True):
            row = self._sums[index]
            row[COLUMN["gradient"]] += (grad.detach().float() * scale).square().sum()
            _count_nonfinite(row, grad.detach())


def _count_nonfinite(row: Tensor, grad: Tensor) -> None:
    row[COLUMN["nan"]] += grad.isnan().sum()
    row[COLUMN["inf"]] += grad.isinf().sum()


@fused
def _seen(before: Tensor, after: Tensor, grad: Tensor, m: Tensor, v: Tensor, *numbers: Tensor) -> Tensor:
    """fp32 [7]: the columns of ``SUMS`` up to those of gradients that are not finite, and the largest v."""
    grad_scale, inv_root_correction2, eps, decay, step_size = numbers
    p, g = before.float(), grad.float() * grad_scale
    change = m / (v.sqrt() * inv_root_correction2 + eps) + p * decay
    lost = ((before == after) & (change != 0)).sum() * (step_size != 0)
    highest = torch.where(v == v, v, 0.0).amax()
    squares = [(each * each).sum() for each in (g, p, change, m)]  # in pairs, where dot() adds up in a row
    return torch.stack([*squares, v.sum(), lost.float(), highest])


def _codes_seen(root_v: Tensor, new_root_v: Tensor, q: Tensor, new_q: Tensor, new_r: Tensor) -> Tensor:
    """fp32 [4]: the columns of codes."""
    stalled = (q == new_q) & (root_v != new_root_v)
    return torch.stack([each.sum() for each in (new_q == 255, new_q == 1, stalled, new_r == 0)]).float()


def skips(factors: Tensor | None) -> bool:
    return factors is not None and bool((factors == SKIP).any())
