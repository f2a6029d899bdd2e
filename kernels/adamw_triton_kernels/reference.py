"""AdamW in plain torch: the specification, the update of CPU tensors, and the kernels' oracle.

All arithmetic is in fp32, whatever the dtypes of parameters and gradients. These are dense and taken
as they lie in memory, a gradient in its parameter's order. State arrays are flat; each tensor's state
is the range of the arrays that begins at its offset.

AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.

The 8-bit state: a block of consecutive elements has two bf16 scales, S and R, and each element two codes:

    sqrt(v) = S * (q/255)**2    q in 0..255        m = R * (r/127) * sqrt(v)    r in -127..127

S is kept while it fits the block (a scale that moved at every step would round every element anew).
q is rounded so that v is right on average: v changes by 0.1% a step where a code is worth a few
percent, and rounding to nearest would freeze it. m is stored as its ratio to the *decoded* sqrt(v),
so the noise of q does not reach it, and the ratio is bounded and close to the update itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adamw_triton_kernels.work import Hyper, Layout

# Elements that are updated at a time: bounds the temporaries of a step (some 10 MB), and small
# enough that they stay in the processor's cache. A multiple of every block size.
CHUNK = 1 << 18

LARGEST = 3.0e38
LARGEST_ROOT = 1.6e19  # the square of 1.125 times this is still finite
TINY_SCALE = 1e-18  # below, a block's v counts as zero: fp32's own v = scale**2 ends near 1e-38
TINY_RATIO = 1e-12  # below, a block's m counts as zero
COARSE = 3  # codes up to this are rounded up
DITHER_ELEMENT = 0xC13FA9A9


def adamw_32bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Tensor],
    layout: Layout,
    hypers: Sequence[Hyper],
) -> None:
    """One AdamW step in place. State: fp32 ``exp_avg``, ``exp_avg_sq`` and, with amsgrad,
    ``max_exp_avg_sq`` (Reddi et al. 2018, arXiv:1904.09237)."""
    for p, g, hyper, at, _first in _chunks(params, grads, layout, hypers):
        m, v = state["exp_avg"][at], state["exp_avg_sq"][at]
        _new_moments(m, v, g.float(), hyper)
        if "max_exp_avg_sq" in state:
            v = torch.maximum(state["max_exp_avg_sq"][at], v, out=state["max_exp_avg_sq"][at])
        p.copy_(_new_weight(p.float(), m, v.sqrt(), hyper))


def adamw_8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Tensor],
    layout: Layout,
    hypers: Sequence[Hyper],
) -> None:
    """One AdamW step in place. State: ``exp_avg_codes`` int8, ``exp_avg_sq_codes`` uint8, and bf16
    ``exp_avg_scales``, ``exp_avg_sq_scales``, one a block."""
    block = state["exp_avg_codes"].numel() // state["exp_avg_scales"].numel()
    for p, g, hyper, at, first in _chunks(params, grads, layout, hypers):
        blocks = slice(at.start // block, -(-at.stop // block))
        part = {name: array[blocks if name.endswith("scales") else at] for name, array in state.items()}
        m, v = decode_8bit(part, block)
        _new_moments(m, v, g.float(), hyper)
        p.copy_(_new_weight(p.float(), m, v.sqrt(), hyper))
        encode_8bit(m, v, part, block, first=first, phase=hyper.phase)


def _new_moments(m: Tensor, v: Tensor, g: Tensor, hyper: Hyper) -> None:
    """m + (1-beta1)*(g - m) and v + (1-beta2)*(g*g - v), in place."""
    if hyper.grad_scale != 1.0:
        g = g * hyper.grad_scale
    m.add_((g - m).mul_(hyper.lerp1))
    v.add_((g * g).sub_(v).mul_(hyper.lerp2))


def _new_weight(p: Tensor, m: Tensor, root_v: Tensor, hyper: Hyper) -> Tensor:
    """p - lr*weight_decay*p - lr/correction1 * m / (sqrt(v)/sqrt(correction2) + eps)"""
    denominator = root_v.mul(hyper.inv_root_correction2).add_(hyper.eps)
    change = (p * hyper.decay).addcdiv_(m, denominator, value=hyper.step_size)
    return p - change


def decode_8bit(state: Mapping[str, Tensor], block: int) -> tuple[Tensor, Tensor]:
    """m and v, fp32. The last block may be a part of one."""
    q = _blocks(state["exp_avg_sq_codes"], block)
    r = _blocks(state["exp_avg_codes"], block)
    root_v = (q * q).mul_(state["exp_avg_sq_scales"].float()[:, None] * (1 / 65025))
    m = r.mul_(state["exp_avg_scales"].float()[:, None] * (1 / 127)).mul_(root_v)
    n = state["exp_avg_codes"].numel()
    return m.flatten()[:n], root_v.square_().flatten()[:n]


def encode_8bit(
    m: Tensor, v: Tensor, state: Mapping[str, Tensor], block: int, *, first: int = 0, phase: int = 0
) -> None:
    """Store m and v, fp32; ``state`` holds the previous scales.

    ``first``: index in its parameter of the first element; with ``phase`` it picks the dither.
    """
    n = m.numel()
    root_v = _blocks(v, block).sqrt_()
    scale = _sticky_scale(state["exp_avg_sq_scales"].float(), _peaks(root_v))
    per_unit = torch.where(scale > 0, 65025 * _reciprocal(scale.clamp(min=TINY_SCALE)), 0.0)[:, None]
    q = _encode_root_v(root_v, per_unit, first, phase)
    state["exp_avg_sq_codes"].copy_(q.flatten()[:n])
    state["exp_avg_sq_scales"].copy_(scale)

    inv_q = _reciprocal(q)
    ratio = _blocks(m, block).mul_(inv_q).mul_(inv_q)  # m/sqrt(v) in units of 1/per_unit
    scale = _ratio_scale(_peaks(ratio.abs())[:, None].mul_(per_unit))
    per_ratio = torch.where(scale > 0, 127 * _reciprocal(scale.clamp(min=TINY_RATIO)), 0.0)
    r = ratio.mul_(per_unit * per_ratio).round_()
    state["exp_avg_codes"].copy_(r.flatten()[:n])
    state["exp_avg_scales"].copy_(scale.flatten())


def _blocks(flat: Tensor, block: int) -> Tensor:
    """A new fp32 tensor [blocks, block], the last block filled up with zeros."""
    padded = torch.zeros(-(-flat.numel() // block), block, device=flat.device)
    padded.view(-1)[: flat.numel()] = flat
    return padded


def _reciprocal(x: Tensor) -> Tensor:
    """1/x for x > 0, as the kernels compute it."""
    return x.rsqrt().square_()


def _peaks(blocks: Tensor) -> Tensor:
    """Each block's largest element; NaN takes no part, as in the kernels."""
    peaks = blocks.amax(dim=1)
    return blocks.nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1) if peaks.isnan().any() else peaks


def _sticky_scale(scale: Tensor, peak: Tensor) -> Tensor:
    """The old scale where scale/2 <= peak <= scale, else 1.125 * peak: room to grow. The old one too
    where an element's v has overflowed: that element is lost in any format, its block need not be."""
    keeps = ((peak <= scale) & (peak >= 0.5 * scale)) | (peak > LARGEST_ROOT)
    scale = torch.where(keeps, scale, _up_to_bf16(1.125 * peak))
    return torch.where(peak >= TINY_SCALE, scale, 0.0)


def _ratio_scale(peak: Tensor) -> Tensor:
    return torch.where(peak >= TINY_RATIO, _up_to_bf16(peak.clamp(max=LARGEST)), 0.0)


def _encode_root_v(root_v: Tensor, per_unit: Tensor, first: int, phase: int) -> Tensor:
    """q, as fp32: with y = 255*sqrt(root_v/S) and low = floor(y), it is low or low + 1 so that on
    average over the dither q**4 is y**4.

    The lowest codes lie factors apart. There q is low + 1, never a zero: a denominator too small by
    such a factor would throw the weight, one too large only slows it.
    """
    squared = root_v * (per_unit * (1 - 2**-20))  # y**2; a shade less, so that q never reaches 256
    low = squared.sqrt().floor_()
    odd = low * 2**-10 + 2**-11
    width = (odd * odd).add_(2**-22).mul_(odd)  # (low+1)**4 - low**4 = (2*low+1)((2*low+1)**2+1)/2
    above = (squared * squared).sub_((low * low).square_())
    up = _dither(root_v, first, phase).mul_(width) < above
    return torch.maximum(low + up, (low + 1).clamp_(max=COARSE))


def _dither(like: Tensor, first: int, phase: int) -> Tensor:
    """(index*0xC13FA9A9 + phase) mod 2**32: a Weyl sequence, evenly spread over steps and elements."""
    index = torch.arange(like.numel(), dtype=torch.int64, device=like.device).view_as(like)
    start = (first * DITHER_ELEMENT + phase) % 2**32
    return ((index * DITHER_ELEMENT + start) & 0xFFFFFFFF).float()


def _up_to_bf16(x: Tensor) -> Tensor:
    """The smallest bf16 value >= x, as fp32; x finite and >= 0."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def _chunks(
    params: Sequence[Tensor], grads: Sequence[Tensor], layout: Layout, hypers: Sequence[Hyper]
) -> Iterator[tuple[Tensor, Tensor, Hyper, slice, int]]:
    """Pieces of at most ``CHUNK`` elements: parameter, gradient, hyperparameters, the range of the
    state arrays, the index of the first element in the whole parameter."""
    for p, g, offset, first, row in zip(
        params, grads, layout.offsets, layout.firsts, layout.rows, strict=True
    ):
        p, g = _in_memory_order(p), _in_memory_order(g)
        for start in range(0, p.numel(), CHUNK):
            piece = p[start : start + CHUNK]
            at = slice(offset + start, offset + start + piece.numel())
            yield piece, g[start : start + CHUNK], hypers[row], at, first + start


def _in_memory_order(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,))
