"""AdamW in plain torch: the specification, the update of CPU tensors, and the kernels' oracle.

All arithmetic is in fp32, whatever the dtypes of parameters and gradients. These are dense and taken
as they lie in memory, a gradient in its parameter's order. State arrays are flat; each tensor's state
is the range of the arrays that begins at its offset. The 8-bit code: ``codes.py``.

AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.

At the ends of fp32's range. An eps below 1.1e-19 counts as that (``work.SMALLEST_EPS``): no denominator is
zero. A v below 1.2e-38 counts on GPUs as zero where its square root is taken: beside an eps below 1e-12 the
weight changes by up to twice as much, and of 8-bit state the element has code 1. A v that overflows, of
gradients above 1.8e19, is infinite and stops its weight: with 32-bit state for good (or as NaN, if beta2 is
0, as in torch), with 8-bit state for that step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton_kernels import fusion
from adamw_triton_kernels.codes import (
    LARGEST,
    Dither,
    blocks_of,
    decoded,
    encode,
    peaks_of,
    put,
    rows_of,
    sqrt,
)
from adamw_triton_kernels.fusion import fused
from adamw_triton_kernels.runs import Run, runs
from adamw_triton_kernels.work import Arrays, Call, Layout, Update

# Elements that are updated at a time: bounds the temporaries of a step (some 10 MB), and small
# enough that they stay in the processor's cache. A multiple of every block size.
CHUNK = 1 << 18
FUSED_CHUNK = 1 << 20  # of 8-bit state, compiled: two temporaries, and a call costs more
WHOLE = 1 << 62  # of 32-bit state, compiled: no temporaries
GATHERED = 1 << 17  # of several small tensors with 32-bit state
TEMPORARIES = 48  # bytes an element, at most, that are in use at a time


@Update
def adamw_32bit(
    params: Sequence[Tensor], grads: Sequence[Tensor], state: Arrays, layout: Layout, hyper: Tensor
) -> Call:
    """One AdamW step in place. State: fp32 ``exp_avg``, ``exp_avg_sq`` and, with amsgrad,
    ``max_exp_avg_sq`` (Reddi et al. 2018, arXiv:1904.09237)."""
    update = _update_amsgrad if "max_exp_avg_sq" in state else _update
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: len(state)]
    rows = Row.of_all(hyper)

    def step(run: Run, arrays: Arrays) -> None:
        update(run.param, run.grad, *[arrays[name][run.at] for name in names], *rows[run.row])

    lengths = {"plain": (CHUNK, GATHERED), "compiled": (WHOLE, GATHERED)}
    return _prepared(step, names, params, grads, state, layout, **lengths)


@fused
def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *numbers: Tensor) -> None:
    row = Row(*numbers)
    _new_moments(m, v, g, row)
    p.copy_(_new_weight(p, m, sqrt(v), row))


@fused
def _update_amsgrad(p: Tensor, g: Tensor, m: Tensor, v: Tensor, largest: Tensor, *numbers: Tensor) -> None:
    row = Row(*numbers)
    _new_moments(m, v, g, row)
    largest.copy_(torch.maximum(largest, v))
    p.copy_(_new_weight(p, m, sqrt(largest), row))


@Update
def adamw_8bit(
    params: Sequence[Tensor], grads: Sequence[Tensor], state: Arrays, layout: Layout, hyper: Tensor
) -> Call:
    """One AdamW step in place. State: ``exp_avg_codes`` int8, ``exp_avg_sq_codes`` uint8, and bf16
    ``exp_avg_scales``, ``exp_avg_sq_scales``, one a block."""
    block = state["exp_avg_codes"].numel() // state["exp_avg_scales"].numel()
    dither = Dither.of(min(sum(layout.numels), FUSED_CHUNK), block, params[0].device)
    rows, phases = Row.of_all(hyper), hyper[:, 7].view(torch.int32).tolist()

    def step(run: Run, arrays: Arrays) -> None:
        p, g, row, at, spans = run
        blocks = slice(at.start // block, -(-at.stop // block))
        part = {name: array[blocks if name.endswith("scales") else at] for name, array in arrays.items()}
        weight = blocks_of(p, block)
        m, root_v, peaks = _update_8bit(weight, blocks_of(g, block), *rows_of(part, block), *rows[row])
        put(p, weight)
        encode(m, root_v, peaks, part, dither.starts(spans, phases[row]), dither.steps)

    lengths = {"plain": (CHUNK, CHUNK), "compiled": (FUSED_CHUNK, FUSED_CHUNK)}
    return _prepared(step, block, params, grads, state, layout, **lengths)


def _prepared(
    step: Callable[[Run, Arrays], None],
    kind: Hashable,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Arrays,
    layout: Layout,
    *,
    plain: tuple[int, int],
    compiled: tuple[int, int],
) -> Call:
    """``step`` on every run, as soon as it is called. There is room for its temporaries by then.

    Args:
        kind: tells apart steps that call other functions, or with other shapes for a run of one length.
        plain, compiled: how long runs are, of one tensor and of several.
    """
    if fusion.compiles() and params[0].is_cpu:
        _rehearse(step, kind, params, grads, state, layout, compiled)
    todo = runs(params, grads, layout, *(compiled if fusion.compiles() else plain))
    room = TEMPORARIES * min(sum(layout.numels), CHUNK)  # compiled, runs are longer and need less
    params[0].new_empty(room, dtype=torch.uint8)

    def update(arrays: Arrays) -> None:
        with fusion.performance():
            for run in todo:
                step(run, arrays)

    return update


_rehearsed: dict[Hashable, set[int]] = defaultdict(set)
"""Lengths of runs, by all else that the code depends on."""


def _rehearse(
    step: Callable[[Run, Arrays], None],
    kind: Hashable,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Arrays,
    layout: Layout,
    lengths: tuple[int, int],
) -> None:
    """Have all compiled that ``step`` calls. The code it needs depends on its kind, on dtypes and on a run's
    length: what another layout has rehearsed is not done again."""
    key = ("rehearsed", kind, params[0].dtype, grads[0].dtype, torch.get_num_threads())
    if key in layout.tables:
        return
    arrays = {name: array.to("meta") for name, array in state.items()}
    ps, gs = ([tensor.to("meta") for tensor in tensors] for tensors in (params, grads))
    seen = _rehearsed[key]
    with fusion.rehearsal():
        for run in runs(ps, gs, layout, *lengths):
            if (length := run.at.stop - run.at.start) not in seen:
                step(run, arrays)
                seen.add(length)
    layout.tables[key] = True


@fused
def _update_8bit(
    p: Tensor, g: Tensor, r: Tensor, r_scale: Tensor, q: Tensor, q_scale: Tensor, *numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Updates p; the new m and sqrt(v), and the largest sqrt(v) of each block."""
    row = Row(*numbers)
    m, v = decoded(r, r_scale, q, q_scale)
    _new_moments(m, v, g, row)
    root_v = sqrt(v)
    p.copy_(_new_weight(p, m, root_v, row))
    return m, root_v, peaks_of(root_v)


class Row(NamedTuple):
    """A row of the hyper table as the arithmetic takes it: tensors of no dimension."""

    grad_scale: Tensor
    forgets1: Tensor
    of_m: Tensor
    of_g: Tensor
    forgets2: Tensor
    of_v: Tensor
    of_square: Tensor
    inv_root_correction2: Tensor
    eps: Tensor
    step_size: Tensor
    decay: Tensor

    @classmethod
    def of_all(cls, hyper: Tensor) -> list[Row]:
        """Worked out once for all tensors of a call: small ones cost a few operations each."""
        grad_scale, gap1, gap2, *others = hyper[:, :7].unbind(1)
        columns = (grad_scale, *_shares(gap1), *_shares(gap2), *others)
        return [cls(*row) for row in zip(*[column.unbind() for column in columns], strict=True)]


def _shares(gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether beta*old + (1-beta)*new leaves old out, then the shares of old and new that are added.

    From a half on it is old, less the gap's share: 0.999 rounded to fp32 would move the equilibrium of v by
    1e-5. Below, where that would cancel, nothing is taken away.
    """
    near_zero = gap.signbit()
    return near_zero, -gap, torch.where(near_zero, 1 + gap, gap)


def _new_moments(m: Tensor, v: Tensor, g: Tensor, row: Row) -> None:
    """beta1*m + (1-beta1)*g and beta2*v + (1-beta2)*g*g, in place."""
    g = g.float() * row.grad_scale
    _mix(v, g * g, row.forgets2, row.of_v, row.of_square)
    _mix(m, g, row.forgets1, row.of_m, row.of_g)


def _mix(old: Tensor, new: Tensor, forgets: Tensor, of_old: Tensor, of_new: Tensor) -> None:
    """In place, by ``_shares``; new is used up."""
    change = (old * of_old).nan_to_num_(math.nan, math.inf, -LARGEST)  # an infinite v stays so
    old.masked_fill_(forgets, 0.0).add_(change.add_(new.mul_(of_new)))


def _new_weight(p: Tensor, m: Tensor, root_v: Tensor, row: Row) -> Tensor:
    """p - lr/correction1 * (m / (sqrt(v)/sqrt(correction2) + eps) + decay*p)"""
    p = p.float()
    update = m / (root_v * row.inv_root_correction2).add_(row.eps)
    weight: Tensor = p - update.add_(p * row.decay).mul_(row.step_size)
    return weight
