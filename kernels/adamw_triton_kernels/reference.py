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

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
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
from adamw_triton_kernels.statistics import Codes, Tally, skips
from adamw_triton_kernels.weights import ELEMENT, PHASE, beside, read, write
from adamw_triton_kernels.work import (
    MASTER,
    NEAREST,
    STOCHASTIC,
    Addresses,
    Arrays,
    Call,
    Layout,
    Update,
)

# Elements that are updated at a time: bounds the temporaries of a step (some 10 MB), and small
# enough that they stay in the processor's cache. A multiple of every block size.
CHUNK = 1 << 18
FUSED_CHUNK = 1 << 20  # of 8-bit state, compiled: two temporaries, and a call costs more
WHOLE = 1 << 62  # of 32-bit state, compiled: no temporaries
GATHERED = 1 << 17  # of several small tensors with 32-bit state
ALIGNMENT = 32  # elements: where 32-bit state of a tensor begins
TEMPORARIES = 48  # bytes an element, at most, that are in use at a time


@Update
def adamw_32bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Arrays,
    layout: Layout,
    hyper: Tensor,
    weights: str,
    factors: Tensor | None,
    addresses: Addresses | None,
    sums: Tensor | None,
) -> Call:
    """One AdamW step in place. State: fp32 ``exp_avg``, ``exp_avg_sq`` and, with amsgrad,
    ``max_exp_avg_sq`` (Reddi et al. 2018, arXiv:1904.09237)."""
    amsgrad = "max_exp_avg_sq" in state
    update = _update_32bit(weights, amsgrad)
    names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * amsgrad]
    tally = None if sums is None else Tally(sums, layout, hyper, factors)
    if skips(factors):
        return _left(tally, grads)
    hyper, layout = _scaled(hyper, layout, factors)
    rows, phases = Row.of_all(hyper), _phases(hyper)
    longest = WHOLE if weights not in (STOCHASTIC, MASTER) and tally is None else FUSED_CHUNK
    dither = _dither_of(weights, min(sum(layout.numels), longest), ALIGNMENT, params[0].device)

    def step(run: Run, arrays: Arrays) -> None:
        own = [arrays[name][run.at] for name in names]
        if weights in arrays:
            own += beside(arrays[weights][run.at], run.param.dtype, weights)
        if dither is not None:
            bits = dither.starts(run.spans, phases[run.row] * PHASE) + dither.steps
            own.append(bits.view(-1)[: run.param.numel()])
        kept = own[len(names) :]
        before = None if tally is None else read(run.param, kept, weights).clone()
        update(run.param, run.grad, *rows[run.row], *own)
        if tally is not None and before is not None:
            kept = _kept({name: array[run.at] for name, array in arrays.items()}, run.param, weights)
            after = read(run.param, kept, weights)
            tally.add(run, before, after, own[0], own[len(names) - 1], rows[run.row].told)

    lengths = {"plain": (CHUNK, GATHERED), "compiled": (longest, GATHERED)}
    kind = (weights, amsgrad, tally is None)
    return _prepared(step, kind, params, grads, state, layout, **lengths)


@functools.cache
def _update_32bit(weights: str, amsgrad: bool) -> Callable[..., None]:
    @fused
    def update(p: Tensor, g: Tensor, *tensors: Tensor) -> None:
        row, (m, v, *others) = _unpacked(tensors)
        largest, kept = others[:amsgrad], others[amsgrad:]
        _new_moments(m, v, g, row)
        if largest:
            v = largest[0].copy_(torch.maximum(largest[0], v))
        write(_new_weight(read(p, kept, weights), m, sqrt(v), row), p, kept, weights)

    return update


@Update
def adamw_8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Arrays,
    layout: Layout,
    hyper: Tensor,
    weights: str,
    factors: Tensor | None,
    addresses: Addresses | None,
    sums: Tensor | None,
) -> Call:
    """One AdamW step in place. State: ``exp_avg_codes`` int8, ``exp_avg_sq_codes`` uint8, and bf16
    ``exp_avg_scales``, ``exp_avg_sq_scales``, one a block."""
    block = state["exp_avg_codes"].numel() // state["exp_avg_scales"].numel()
    most, device = min(sum(layout.numels), FUSED_CHUNK), params[0].device
    dither = Dither.of(most, block, device)
    other_dither = _dither_of(weights, most, block, device)
    tally = None if sums is None else Tally(sums, layout, hyper, factors)
    if skips(factors):
        return _left(tally, grads)
    hyper, layout = _scaled(hyper, layout, factors)
    rows, phases = Row.of_all(hyper), _phases(hyper)
    opened, closed = _apart(weights)

    def step(run: Run, arrays: Arrays) -> None:
        p, g, row, at, spans = run
        blocks = slice(at.start // block, -(-at.stop // block))
        part = {name: array[blocks if name.endswith("scales") else at] for name, array in arrays.items()}
        weight = blocks_of(p, block)
        kept = [blocks_of(part[weights], block)] if weights in part else []
        others = [each for array in kept for each in beside(array, p.dtype, weights)]
        if tally is not None:
            before, q = read(p, _kept(part, p, weights), weights).clone(), part["exp_avg_sq_codes"].clone()
            _, old_v = decoded(*rows_of(part, block))
        if other_dither is not None:
            others = [other_dither.starts(spans, phases[row] * PHASE), other_dither.steps]
        x = weight if weights == NEAREST else opened(weight, *others)
        m, root_v, peaks = _update_8bit(x, blocks_of(g, block), *rows[row], *rows_of(part, block))
        if weights != NEAREST:
            closed(x, weight, *others)
        put(p, weight)
        for array in kept:
            put(part[weights], array)
        encode(m, root_v, peaks, part, dither.starts(spans, phases[row]), dither.steps)
        if tally is not None:
            m, root_v, old = (each.view(-1)[: p.numel()] for each in (m, root_v, old_v.sqrt()))
            codes = Codes(old, root_v, q, part["exp_avg_sq_codes"], part["exp_avg_codes"])
            after = read(p, _kept(part, p, weights), weights)
            tally.add(run, before, after, m, root_v * root_v, rows[row].told, codes)

    lengths = {"plain": (CHUNK, CHUNK), "compiled": (FUSED_CHUNK, FUSED_CHUNK)}
    kind = (weights, block, tally is None)
    return _prepared(step, kind, params, grads, state, layout, **lengths)


@fused
def _update_8bit(p: Tensor, g: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Updates p; the new m and sqrt(v), and the largest sqrt(v) of each block."""
    row, moments = _unpacked(tensors)
    m, v = decoded(*moments)
    _new_moments(m, v, g, row)
    root_v = sqrt(v)
    p.copy_(_new_weight(p.float(), m, root_v, row))
    return m, root_v, peaks_of(root_v)


@functools.cache
def _apart(weights: str) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """``read`` and ``write`` by themselves: beside so much other work, code of theirs, which torch's compiler
    cannot vectorize, would keep all of it from being."""
    return (
        fused(lambda p, *kept: read(p, kept, weights)),
        fused(
            lambda x, p, *kept: write(x, p, [kept[0] + kept[1]] if weights == STOCHASTIC else kept, weights)
        ),
    )


def _left(tally: Tally | None, grads: Sequence[Tensor]) -> Call:
    """What is left of a step that is skipped."""

    def leave(state: Arrays) -> None:
        if tally is not None:
            tally.skipped(grads)

    return leave


def _kept(arrays: Arrays, p: Tensor, weights: str) -> list[Tensor]:
    """What goes with the weight, for ``read``."""
    return beside(arrays[weights], p.dtype, weights) if weights in arrays else []


def _scaled(hyper: Tensor, layout: Layout, factors: Tensor | None) -> tuple[Tensor, Layout]:
    """With the factors in the hyperparameters: of one, the same layout; else one of a row for each tensor."""
    if factors is None:
        return hyper, layout
    if layout.factors:
        apart: Layout | None = layout.tables.get("apart")
        if apart is None:
            rows = tuple(range(len(layout.numels)))
            apart = layout.tables["apart"] = replace(layout, rows=rows, factors=(), tables={})
        hyper, factors = hyper[list(layout.rows)], factors[list(layout.factors)]
        layout = apart
    hyper = hyper.clone()
    hyper[:, 0] *= factors
    return hyper, layout


def _phases(hyper: Tensor) -> list[int]:
    """Of each row."""
    phases: list[int] = hyper[:, 7].view(torch.int32).tolist()
    return phases


def _dither_of(weights: str, numel: int, block: int, device: torch.device) -> Dither | None:
    """Of the weights."""
    return Dither.of(numel, block, device, ELEMENT) if weights == STOCHASTIC else None


def _unpacked(tensors: Sequence[Tensor]) -> tuple[Row, Sequence[Tensor]]:
    numbers = len(Row._fields)
    return Row(*tensors[:numbers]), tensors[numbers:]


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
        for run in todo:
            step(run, arrays)

    return functools.partial(fusion.perform, update)


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
    for run in runs(ps, gs, layout, *lengths):
        if (length := run.at.stop - run.at.start) not in seen:
            fusion.rehearse(step, run, arrays)
            seen.add(length)
    layout.tables[key] = True


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

    @property
    def told(self) -> tuple[Tensor, ...]:
        """What statistics are made with, see ``Tally``."""
        return self.inv_root_correction2, self.eps, self.decay, self.step_size

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
    update = m / (root_v * row.inv_root_correction2).add_(row.eps)
    weight: Tensor = p - update.add_(p * row.decay).mul_(row.step_size)
    return weight
