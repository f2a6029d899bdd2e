"""The blockwise 8-bit code in plain torch: how m and v become codes and scales, and back. In Triton:
``blockwise.py``.

A block of consecutive elements has two bf16 scales, S and R, and each element two codes:

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

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton_kernels import fusion
from adamw_triton_kernels.fusion import fused
from adamw_triton_kernels.runs import Span
from adamw_triton_kernels.tables import has_float64

LARGEST = 3.0e38
LARGEST_ROOT = 1.6e19  # the square of 1.125 times this is still finite
TINY_SCALE = 1e-18  # below, a block's v counts as zero: fp32's own v = scale**2 ends near 1e-38
TINY_RATIO = 1e-12  # below, a block's m counts as zero
COARSE = 3  # codes up to this are rounded up
DITHER_ELEMENT = 0xC13FA9A9 - 2**32  # the same modulo 2**32, and no product overflows


def decode_8bit(state: Mapping[str, Tensor], block: int) -> tuple[Tensor, Tensor]:
    """m and v, fp32. The last block may be a part of one."""
    n = state["exp_avg_codes"].numel()
    m, v = decoded(*rows_of(state, block))
    return m.flatten()[:n], v.flatten()[:n]


def encode_8bit(
    m: Tensor, v: Tensor, state: Mapping[str, Tensor], block: int, *, first: int = 0, phase: int = 0
) -> None:
    """Store m and v, fp32; ``state`` holds the previous scales.

    ``first``: index in its parameter of the first element; with ``phase`` it picks the dither.
    """
    root_v = sqrt(blocks_of(v, block))
    dither = Dither.of(m.numel(), block, m.device)
    starts = dither.starts([Span(0, m.numel(), first)], phase)
    encode(blocks_of(m, block), root_v, peaks_of(root_v), state, starts, dither.steps)


def rows_of(state: Mapping[str, Tensor], block: int) -> list[Tensor]:
    """Codes [blocks, block] and their scales [blocks, 1], of m, then of v."""
    return [
        rows
        for moment in ("exp_avg", "exp_avg_sq")
        for rows in (blocks_of(state[f"{moment}_codes"], block), state[f"{moment}_scales"].float()[:, None])
    ]


def blocks_of(flat: Tensor, block: int) -> Tensor:
    """``flat`` as [blocks, block]; if the last block is a part of one, a copy filled up with zeros."""
    short = -flat.numel() % block
    return (torch.nn.functional.pad(flat, (0, short)) if short else flat).view(-1, block)


def put(flat: Tensor, blocks: Tensor) -> None:
    """Into ``flat`` what ``_blocks`` has made of it, if that was a copy."""
    if flat.numel() < blocks.numel():
        flat.copy_(blocks.view(-1)[: flat.numel()])


def decoded(r: Tensor, r_scale: Tensor, q: Tensor, q_scale: Tensor) -> tuple[Tensor, Tensor]:
    q = q.float()
    root_v = (q * q).mul_(q_scale * (1 / 65025))
    m = r.float().mul_(r_scale * (1 / 127)).mul_(root_v)
    return m, root_v.square_()


def encode(
    m: Tensor,
    root_v: Tensor,
    peaks: Tensor,
    state: Mapping[str, Tensor],
    starts: Tensor,
    steps: Tensor,
) -> None:
    """Store m and sqrt(v) [blocks, block], given the largest sqrt(v) of each block and the ``Dither``."""
    block = m.shape[1]
    r, q = (blocks_of(state[name], block) for name in ("exp_avg_codes", "exp_avg_sq_codes"))
    scale = _sticky_scale(state["exp_avg_sq_scales"].float(), peaks)
    per_unit = torch.where(scale > 0, 65025 / scale.clamp(min=TINY_SCALE), 0.0)[:, None]
    ratio, peaks = _encode_v(m, root_v, per_unit, starts, steps, q)
    state["exp_avg_sq_scales"].copy_(scale)
    put(state["exp_avg_sq_codes"], q)

    scale = _ratio_scale(peaks[:, None] * per_unit)
    per_ratio = torch.where(scale > 0, 127 / scale.clamp(min=TINY_RATIO), 0.0)
    _encode_m(ratio, per_unit * per_ratio, r)
    state["exp_avg_scales"].copy_(scale.flatten())
    put(state["exp_avg_codes"], r)


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
    return ratio, peaks_of(ratio.abs())


@fused
def _encode_m(ratio: Tensor, per_ratio: Tensor, r: Tensor) -> None:
    r.copy_(_bounded((ratio * per_ratio).round_(), 127))


def _bounded(codes: Tensor, last: int) -> Tensor:
    """The last code for what is more, and for what is NaN and has no integer."""
    return codes.nan_to_num(nan=last).clamp_(max=last)


def peaks_of(blocks: Tensor) -> Tensor:
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
    low = sqrt(squared).floor_()
    odd = (low * 2**-10).add_(2**-11)
    width = (odd * odd).add_(2**-22).mul_(odd)  # (low+1)**4 - low**4 = (2*low+1)((2*low+1)**2+1)/2
    low_squared = low * low
    above = (squared - low_squared).mul_(squared + low_squared)  # squared**2 - low**4
    up = (width.mul_(dither) < above).logical_or_(low < COARSE)
    return low + up


class Dither(NamedTuple):
    """A Weyl sequence over elements and steps, evenly spread over both: (index*element + phase) mod 2**32, as
    int32 bits. Of a sum of indices it is the sum."""

    blocks: Tensor
    """[blocks, 1]: of each block's first element, counted from the first block."""
    steps: Tensor
    """[block]: from there to each element."""
    element: int
    """From one element to the next."""

    @classmethod
    def of(cls, numel: int, block: int, device: torch.device, element: int = DITHER_ELEMENT) -> Dither:
        """Of at most so many elements."""
        count = -(-numel // block)
        index = torch.arange(max(count, block), device=device)
        blocks, steps = index[:count, None] * _signed(block * element), index[:block] * element
        return cls(blocks.to(torch.int32), steps.to(torch.int32), element)

    def starts(self, spans: Sequence[Span], phase: int) -> Tensor:
        """[blocks, 1] of these, each of which begins with a block."""
        block, first = self.steps.numel(), spans[0].first
        sizes = [-(-span.numel // block) for span in spans]
        starts = self.blocks[: sum(sizes)] + _signed(first * self.element + phase)
        if len(spans) > 1:
            begins = itertools.accumulate(sizes, initial=0)
            jumps = [s.first - first - begin * block for s, begin in zip(spans, begins, strict=False)]
            shifts = [_signed(jump * self.element) for jump in jumps]
            torch._foreach_add_(starts.split_with_sizes(sizes), shifts)
        return starts


def _signed(bits: int) -> int:
    """The int32 of the last 32 bits."""
    return (bits + 2**31) % 2**32 - 2**31


def _unsigned(bits: Tensor) -> Tensor:
    """What int32 bits are without a sign, fp32. By halves, since torch has no arithmetic of such numbers."""
    high, low = (bits >> 16) & 0xFFFF, bits & 0xFFFF
    return high.float().mul_(65536.0).add_(low)


def _up_to_bf16(x: Tensor) -> Tensor:
    """The smallest bf16 value >= x, as fp32; x finite and >= 0."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def sqrt(x: Tensor) -> Tensor:
    """To nearest, as the kernels' and the compiled one; torch's own on the CPU may be an ulp off, and so may
    that of a device which lacks double precision."""
    if fusion.in_one_pass() or not has_float64(x.device):
        return x.sqrt()
    return x.double().sqrt_().float()
