"""How a weight of 16 bits is kept: what an update takes for it and leaves of it, in plain torch. In Triton:
``rounding.py``.

- ``"nearest"``: rounded to its dtype at every step. What is less than half of its last bit is lost.
- ``"stochastic"``, bf16: rounded up or down in proportion to what is cut off, by a dither: right on average.
- ``"remainder"``, bf16: exact. The fp32 weight's bits are (bf16 bits << 16) + remainder, an int16; the bf16
  weight is that one to nearest, ties up in the bits, so that the pair is one to one. NaN has one pair; where
  another number would be NaN with its remainder, somebody has written it, and it counts alone.
- ``"master"``, fp16: exact, by an fp32 master. A weight that is not its master's rounding has been written by
  somebody else, and counts.

The dither is a Weyl sequence over elements and steps, like that of the 8-bit code (``codes.Dither``), whose
constants are others: the two together are evenly spread as pairs (Roberts' R2 sequence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adamw_triton_kernels.work import MASTER, REMAINDER, STOCHASTIC

ELEMENT = 0x91E10DA5 - 2**32  # 2**32 / plastic number**2, to the nearest odd integer; less 2**32 as an int32
PHASE = 0x7713F11F  # times ``Hyper.phase``: a step is 2**32 * (sqrt(2) - 1)


def beside(array: Tensor, dtype: torch.dtype, weights: str) -> list[Tensor]:
    """The array of the state that goes with weights of that dtype, for compiled ``read`` and ``write``.
    A master comes with its rounding: as a part of more, it would be compared without having been rounded."""
    return [array, array.to(dtype)] if weights == MASTER else [array]


def read(p: Tensor, kept: Sequence[Tensor], weights: str) -> Tensor:
    """fp32. ``kept``: the array of the state that goes with the weight, if one does, or what is ``beside``
    it."""
    if weights == REMAINDER:
        bits = (p.view(torch.int16).to(torch.int32) << 16) + kept[0].to(torch.int32)
        exact = bits.view(torch.float32)
        return torch.where(exact == exact, exact, p.float())  # see ``"remainder"`` above
    if weights == MASTER:
        master, rounded = kept if len(kept) > 1 else beside(kept[0], p.dtype, weights)
        return torch.where(rounded == p, master, p.float())
    return p.float()


def write(x: Tensor, p: Tensor, kept: Sequence[Tensor], weights: str) -> None:
    """Into p and its array. ``kept`` of ``"stochastic"``: the dither, int32 bits."""
    if weights == REMAINDER:
        bits = _bits(x)
        p.copy_(_upper(bits + 0x8000))
        kept[0].copy_(bits.to(torch.int16))  # the lower half
    elif weights == STOCHASTIC:
        p.copy_(_upper(_bits(x) + (kept[0] >> 16 & 0xFFFF)))
    else:
        p.copy_(x)
        if weights == MASTER:
            kept[0].copy_(x)


def _bits(x: Tensor) -> Tensor:
    """int32. What is added must not carry a NaN's to other numbers, so it is one NaN."""
    return torch.where(x == x, x, math.nan).view(torch.int32)


def _upper(bits: Tensor) -> Tensor:
    """The upper half of int32 bits, as bf16."""
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
