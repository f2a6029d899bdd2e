"""AdamW in plain torch: the specification, the update of CPU tensors, and the kernels' oracle.

All arithmetic is in fp32, whatever the dtypes of parameters and gradients. These are dense and taken
as they lie in memory, a gradient in its parameter's order. State arrays are flat; each tensor's state
is the range of the arrays that begins at its offset.

AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.

At the ends of fp32's range. An eps below 1.1e-19 counts as that (``work.SMALLEST_EPS``): no denominator is
zero. A v below 1.2e-38 counts on GPUs as zero where its square root is taken: beside an eps below 1e-12 the
weight changes by up to twice as much, and of 8-bit state the element has code 1. A v that overflows, of
gradients above 1.8e19, is infinite and stops its weight: with 32-bit state for good (or as NaN, if beta2 is
0, as in torch), with 8-bit state for that step.

The 8-bit state: a block of consecutive elements has two bf16 scales, S and R, and each element two codes:

    sqrt(v) = S * (q/255)**2    q in 0..255        m = R * (r/127) * sqrt(v)    r in -127..127

S is kept while it fits the block (a scale that moved at every step would round every element anew).
q is rounded so that v is right on average: v changes by 0.1% a step where a code is worth a few
percent, and rounding to nearest would freeze it. m is stored as its ratio to the *decoded* sqrt(v),
so the noise of q does not reach it, and the ratio is bounded and close to the update itself.

Where one element's v overflows, its block keeps S, and others may have outgrown that. Their codes, and that
of the infinite one, stop at 255, and m shrinks in the same proportion, to 0 with the infinite one. An element
that is NaN has the codes 255 and 127.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from adamw_triton_kernels import fusion
from adamw_triton_kernels.fusion import fused
from adamw_triton_kernels.runs import Run, Span, runs
from adamw_triton_kernels.tables import has_float64
from adamw_triton_kernels.work import Arrays, Call, Layout, Update

# Elements that are updated at a time: bounds the temporaries of a step (some 10 MB), and small
# enough that they stay in the processor's cache. A multiple of every block size.
CHUNK = 1 << 18
FUSED_CHUNK = 1 << 20  # of 8-bit state, compiled: two temporaries, and a call costs more
WHOLE = 1 << 62  # of 32-bit state, compiled: no temporaries
GATHERED = 1 << 17  # of several small tensors with 32-bit state

LARGEST = 3.0e38
LARGEST_ROOT = 1.6e19  # the square of 1.125 times this is still finite
TINY_SCALE = 1e-18  # below, a block's v counts as zero: fp32's own v = scale**2 ends near 1e-38
TINY_RATIO = 1e-12  # below, a block's m counts as zero
COARSE = 3  # codes up to this are rounded up
DITHER_ELEMENT = 0xC13FA9A9 - 2**32  # the same modulo 2**32, and no product overflows


@Update
def adamw_32bit(
    params: Sequence[Tensor], grads: Sequence[Tensor], state: Arrays, layout: Layout, hyper: Tensor
) -> Call:
    """One AdamW step in place. State: fp32 ``exp_avg``, ``exp_avg_sq`` and, with amsgrad,
    ``max_exp_avg_sq`` (Reddi et al. 2018, arXiv:1904.09237)."""
    update = _update_amsgrad if "max_exp_avg_sq" in state else _update
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: len(state)]
    numbers = hyper[:, :7].unbind()

    def step(run: Run, arrays: Arrays) -> None:
        update(run.param, run.grad, *[arrays[name][run.at] for name in names], numbers[run.row])

    lengths = {"plain": (CHUNK, GATHERED), "compiled": (WHOLE, GATHERED)}
    return _prepared(step, names, params, grads, state, layout, **lengths)


@fused
def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, numbers: Tensor) -> None:
    _new_moments(m, v, g, numbers)
    p.copy_(_new_weight(p, m, _sqrt(v), numbers))


@fused
def _update_amsgrad(p: Tensor, g: Tensor, m: Tensor, v: Tensor, largest: Tensor, numbers: Tensor) -> None:
    _new_moments(m, v, g, numbers)
    largest.copy_(torch.maximum(largest, v))
    p.copy_(_new_weight(p, m, _sqrt(largest), numbers))


@Update
def adamw_8bit(
    params: Sequence[Tensor], grads: Sequence[Tensor], state: Arrays, layout: Layout, hyper: Tensor
) -> Call:
    """One AdamW step in place. State: ``exp_avg_codes`` int8, ``exp_avg_sq_codes`` uint8, and bf16
    ``exp_avg_scales``, ``exp_avg_sq_scales``, one a block."""
    block = state["exp_avg_codes"].numel() // state["exp_avg_scales"].numel()
    numbers, phases = hyper[:, :7].unbind(), hyper[:, 7].view(torch.int32).tolist()

    def step(run: Run, arrays: Arrays) -> None:
        p, g, row, at, spans = run
        blocks = slice(at.start // block, -(-at.stop // block))
        part = {name: array[blocks if name.endswith("scales") else at] for name, array in arrays.items()}
        weight = _blocks(p, block)
        m, root_v, peaks = _update_8bit(weight, _blocks(g, block), *_rows(part, block), numbers[row])
        _put(p, weight)
        _encode(m, root_v, peaks, part, spans, phases[row])

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
    """``step`` on every run, as soon as it is called.

    Args:
        kind: tells apart steps that call other functions, or with other shapes for a run of one length.
        plain, compiled: how long runs are, of one tensor and of several.
    """
    if fusion.compiles() and params[0].is_cpu:
        _rehearse(step, kind, params, grads, state, layout, compiled)
    todo = runs(params, grads, layout, *(compiled if fusion.compiles() else plain))

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
    p: Tensor, g: Tensor, r: Tensor, r_scale: Tensor, q: Tensor, q_scale: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Updates p; the new m and sqrt(v), and the largest sqrt(v) of each block."""
    m, v = _decoded(r, r_scale, q, q_scale)
    _new_moments(m, v, g, numbers)
    root_v = _sqrt(v)
    p.copy_(_new_weight(p, m, root_v, numbers))
    return m, root_v, _peaks(root_v)


def _new_moments(m: Tensor, v: Tensor, g: Tensor, numbers: Tensor) -> None:
    """beta1*m + (1-beta1)*g and beta2*v + (1-beta2)*g*g, in place."""
    grad_scale, gap1, gap2 = numbers[:3]
    g = g.float() * grad_scale
    _mix(v, g * g, gap2)
    _mix(m, g, gap1)


def _mix(old: Tensor, new: Tensor, gap: Tensor) -> None:
    """beta*old + (1-beta)*new, in place; new is used up.

    From a half on it is old, less the gap's share: 0.999 rounded to fp32 would move the equilibrium of v by
    1e-5. Below, where that would cancel, nothing is taken away.
    """
    near_zero = gap.signbit()
    change = (old * -gap).nan_to_num_(math.nan, math.inf, -LARGEST)  # an infinite v stays so
    change.add_(new.mul_(torch.where(near_zero, 1 + gap, gap)))
    old.masked_fill_(near_zero, 0.0).add_(change)


def _new_weight(p: Tensor, m: Tensor, root_v: Tensor, numbers: Tensor) -> Tensor:
    """p - lr/correction1 * (m / (sqrt(v)/sqrt(correction2) + eps) + decay*p)"""
    inv_root_correction2, eps, step_size, decay = numbers[3:]
    p = p.float()
    update = m / (root_v * inv_root_correction2).add_(eps)
    weight: Tensor = p - update.add_(p * decay).mul_(step_size)
    return weight


def _sqrt(x: Tensor) -> Tensor:
    """To nearest, as the kernels' and the compiled one; torch's own on the CPU may be an ulp off, and so may
    that of a device which lacks double precision."""
    if fusion.in_one_pass() or not has_float64(x.device):
        return x.sqrt()
    return x.double().sqrt_().float()


def decode_8bit(state: Mapping[str, Tensor], block: int) -> tuple[Tensor, Tensor]:
    """m and v, fp32. The last block may be a part of one."""
    n = state["exp_avg_codes"].numel()
    m, v = _decoded(*_rows(state, block))
    return m.flatten()[:n], v.flatten()[:n]


def encode_8bit(
    m: Tensor, v: Tensor, state: Mapping[str, Tensor], block: int, *, first: int = 0, phase: int = 0
) -> None:
    """Store m and v, fp32; ``state`` holds the previous scales.

    ``first``: index in its parameter of the first element; with ``phase`` it picks the dither.
    """
    root_v = _sqrt(_blocks(v, block))
    _encode(_blocks(m, block), root_v, _peaks(root_v), state, [Span(m.numel(), first)], phase)


def _rows(state: Mapping[str, Tensor], block: int) -> list[Tensor]:
    """Codes [blocks, block] and their scales [blocks, 1], of m, then of v."""
    return [
        rows
        for moment in ("exp_avg", "exp_avg_sq")
        for rows in (_blocks(state[f"{moment}_codes"], block), state[f"{moment}_scales"].float()[:, None])
    ]


def _blocks(flat: Tensor, block: int) -> Tensor:
    """``flat`` as [blocks, block]; if the last block is a part of one, a copy filled up with zeros."""
    short = -flat.numel() % block
    return (torch.nn.functional.pad(flat, (0, short)) if short else flat).view(-1, block)


def _put(flat: Tensor, blocks: Tensor) -> None:
    """Into ``flat`` what ``_blocks`` has made of it, if that was a copy."""
    if flat.numel() < blocks.numel():
        flat.copy_(blocks.view(-1)[: flat.numel()])


def _decoded(r: Tensor, r_scale: Tensor, q: Tensor, q_scale: Tensor) -> tuple[Tensor, Tensor]:
    q = q.float()
    root_v = (q * q).mul_(q_scale * (1 / 65025))
    m = r.float().mul_(r_scale * (1 / 127)).mul_(root_v)
    return m, root_v.square_()


def _encode(
    m: Tensor,
    root_v: Tensor,
    peaks: Tensor,
    state: Mapping[str, Tensor],
    spans: Sequence[Span],
    phase: int,
) -> None:
    """Store m and sqrt(v) [blocks, block], given the largest sqrt(v) of each block; a span begins with a
    block."""
    block = m.shape[1]
    r, q = (_blocks(state[name], block) for name in ("exp_avg_codes", "exp_avg_sq_codes"))
    scale = _sticky_scale(state["exp_avg_sq_scales"].float(), peaks)
    per_unit = torch.where(scale > 0, 65025 / scale.clamp(min=TINY_SCALE), 0.0)[:, None]
    firsts = [torch.arange(first, first + n, block, device=m.device) for n, first in spans]
    starts, steps = _weyl(torch.cat(firsts)[:, None], phase), _weyl(torch.arange(block, device=m.device))
    ratio, peaks = _encode_v(m, root_v, per_unit, starts, steps, q)
    state["exp_avg_sq_scales"].copy_(scale)
    _put(state["exp_avg_sq_codes"], q)

    scale = _ratio_scale(peaks[:, None] * per_unit)
    per_ratio = torch.where(scale > 0, 127 / scale.clamp(min=TINY_RATIO), 0.0)
    _encode_m(ratio, per_unit * per_ratio, r)
    state["exp_avg_scales"].copy_(scale.flatten())
    _put(state["exp_avg_codes"], r)


@fused
def _encode_v(
    m: Tensor, root_v: Tensor, per_unit: Tensor, starts: Tensor, steps: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes q; m over the sqrt(v) that q stands for, in units of 1/per_unit, and its peaks. The dither of
    an element is its block's start and its own step."""
    codes = _encoded_root_v(root_v, per_unit, _unsigned(starts + steps))
    q.copy_(_bounded(codes, 255))
    inv = codes.reciprocal()
    ratio = (m * inv).mul_(inv)
    return ratio, _peaks(ratio.abs())


@fused
def _encode_m(ratio: Tensor, per_ratio: Tensor, r: Tensor) -> None:
    r.copy_(_bounded((ratio * per_ratio).round_(), 127))


def _bounded(codes: Tensor, last: int) -> Tensor:
    """The last code for what is more, and for what is NaN and has no integer."""
    return codes.nan_to_num(nan=last).clamp_(max=last)


def _peaks(blocks: Tensor) -> Tensor:
    """Each block's largest element; NaN takes no part, as in the kernels."""
    return torch.where(blocks == blocks, blocks, 0.0).amax(dim=1)


def _sticky_scale(scale: Tensor, peak: Tensor) -> Tensor:
    """The old scale where scale/2 <= peak <= scale, else 1.125 * peak: room to grow. The old one too
    where an element's v has overflowed: that element is lost in any format, its block need not be."""
    keeps = ((peak <= scale) & (peak >= 0.5 * scale)) | (peak > LARGEST_ROOT)
    scale = torch.where(keeps, scale, _up_to_bf16(1.125 * peak))
    return torch.where(peak >= TINY_SCALE, scale, 0.0)


def _ratio_scale(peak: Tensor) -> Tensor:
    return torch.where(peak >= TINY_RATIO, _up_to_bf16(peak.clamp(max=LARGEST)), 0.0)


def _encoded_root_v(root_v: Tensor, per_unit: Tensor, dither: Tensor) -> Tensor:
    """q, as fp32: with y = 255*sqrt(root_v/S) and low = floor(y), it is low or low + 1 so that on
    average over the dither q**4 is y**4. More than 255 where root_v is more than S.

    The lowest codes lie factors apart. There q is low + 1, never a zero: a denominator too small by
    such a factor would throw the weight, one too large only slows it.
    """
    squared = root_v * (per_unit * (1 - 2**-20))  # y**2; a shade less, so that q never reaches 256
    low = _sqrt(squared).floor_()
    odd = (low * 2**-10).add_(2**-11)
    width = (odd * odd).add_(2**-22).mul_(odd)  # (low+1)**4 - low**4 = (2*low+1)((2*low+1)**2+1)/2
    low_squared = low * low
    above = (squared - low_squared).mul_(squared + low_squared)  # squared**2 - low**4
    up = (width.mul_(dither) < above).logical_or_(low < COARSE)
    return low + up


def _weyl(index: Tensor, phase: int = 0) -> Tensor:
    """(index*0xC13FA9A9 + phase) mod 2**32, as int32 bits: a Weyl sequence, evenly spread over steps and
    elements. Of a sum of indices it is the sum."""
    return (index % 2**32 * DITHER_ELEMENT + phase).to(torch.int32)


def _unsigned(bits: Tensor) -> Tensor:
    """What int32 bits are without a sign, fp32. By halves, since torch has no arithmetic of such numbers."""
    high, low = (bits >> 16) & 0xFFFF, bits & 0xFFFF
    return high.float().mul_(65536.0).add_(low)


def _up_to_bf16(x: Tensor) -> Tensor:
    """The smallest bf16 value >= x, as fp32; x finite and >= 0."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)
