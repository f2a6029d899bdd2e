"""How AdamW optimizers name and code their state: one table entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton.arguments import BLOCK_SIZES
from adamw_triton.state.formats import KEPT, Array, Blockwise8, Format, Moments, as_real

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


class Part(NamedTuple):
    """One tensor of an entry."""

    kind: str
    """``"elements"`` in the parameter's shape, ``"scales"`` one a block, or a ``"table"`` of what the codes
    mean."""
    dtypes: tuple[torch.dtype, ...]
    lowest: int | None = None
    """Of the values, where the dtype allows lower ones."""
    highest: float = torch.finfo(torch.float32).max
    """Of their magnitudes, where they are no codes."""
    smallest: float = 0.0
    """Of the values but zero."""
    optional: bool = False


@dataclass(frozen=True)
class Dialect:
    name: str
    parts: Mapping[str, Part]
    decode: Callable[[Mapping[str, Tensor], int], Moments]
    """From its parts and the block size to fp32 moments. Coded parts come flat, others in shape."""
    blocks: tuple[int, ...] | None = ()
    """Block sizes; None for any that divides the tensor. Empty if nothing is coded."""
    format: Callable[[int], Format] | None = None
    """Ours with this block size, if the codes are ours."""
    ignored: frozenset[str] = field(default=frozenset())
    products: tuple[tuple[str, str, str, float], ...] = ()
    """Codes, their scales, what else these are multiplied by, and how large the product may be."""

    @property
    def coded(self) -> bool:
        return self.blocks != ()

    @property
    def optional(self) -> set[str]:
        return {key for key, part in self.parts.items() if part.optional}

    def knows(self, keys: set[str]) -> bool:
        return set(self.parts) - self.optional <= keys <= set(self.parts) | self.ignored


def _renamed(**theirs: str) -> Callable[[Mapping[str, Tensor], int], Moments]:
    def decode(parts: Mapping[str, Tensor], _block: int) -> Moments:
        return {ours: as_real(parts[key]).float() for ours, key in theirs.items() if key in parts}

    return decode


def _looked_up(**theirs: tuple[str, str, str]) -> Callable[[Mapping[str, Tensor], int], Moments]:
    """``theirs``: where the codes, scales and table of each moment are. Dettmers et al. 2022,
    arXiv:2110.02861: an element is its code's value in the table times its block's scale."""

    def decode(parts: Mapping[str, Tensor], block: int) -> Moments:
        return {
            ours: _times_scales(parts[table].float()[parts[codes].int()], parts[scales].float(), block)
            for ours, (codes, scales, table) in theirs.items()
        }

    return decode


def _times_scales(values: Tensor, scales: Tensor, block: int) -> Tensor:
    whole = values.numel() // block
    values[: whole * block].view(whole, block).mul_(scales[:whole, None])
    values[whole * block :].mul_(scales[whole:])
    return values


def _native(array: Array) -> Part:
    if array.per > 1:
        if array.name == "exp_avg_sq_scales":  # of sqrt(v), and v has to be a normal fp32 number
            return Part("scales", _OF_SCALES, lowest=0, highest=_NORMAL.max**0.5, smallest=_NORMAL.tiny**0.5)
        largest = float(torch.finfo(torch.bfloat16).max)
        return Part("scales", _OF_SCALES, lowest=0, highest=largest, smallest=_NORMAL.tiny)
    return Part("elements", (array.dtype,), lowest=-127 if array.dtype is torch.int8 else None)


_NORMAL = torch.finfo(torch.float32)
_OF_SCALES = (torch.bfloat16, torch.float32)

_LARGEST_M = 1e24
"""No AdamW has a larger one: its v would be infinite. Such a number throws weights to infinity."""

_MOMENT = Part("elements", _FLOATS, highest=_LARGEST_M)
_SQUARE = Part("elements", _FLOATS, lowest=0)
_CODES = Part("elements", (torch.uint8,))
_SCALES = Part("scales", (torch.float32,), lowest=0)
_TABLES = (Part("table", (torch.float32,)), Part("table", (torch.float32,), lowest=0))
"""Of m, and of v."""

_OF_WEIGHTS = {name: Part("elements", (array.dtype,), optional=True) for name, array in KEPT.items()}
"""Ours, beside anybody's moments."""

DIALECTS = (
    Dialect(
        "torch.optim.AdamW and Adam, and our 32-bit state",
        {
            "exp_avg": _MOMENT,
            "exp_avg_sq": _SQUARE,
            "max_exp_avg_sq": _SQUARE._replace(optional=True),
            **_OF_WEIGHTS,
        },
        _renamed(exp_avg="exp_avg", exp_avg_sq="exp_avg_sq", max_exp_avg_sq="max_exp_avg_sq"),
    ),
    Dialect(
        "our 8-bit state",
        {array.name: _native(array) for array in Blockwise8().moments} | _OF_WEIGHTS,
        lambda parts, block: Blockwise8(block).decode(parts),
        blocks=BLOCK_SIZES,
        format=Blockwise8,
        products=(("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_scales", _LARGEST_M),),
    ),
    Dialect(
        "bitsandbytes 32-bit",
        {"state1": _MOMENT, "state2": _SQUARE, **_OF_WEIGHTS},
        _renamed(exp_avg="state1", exp_avg_sq="state2"),
        ignored=frozenset({"unorm_vec"}),
    ),
    Dialect(
        "bitsandbytes 8-bit",
        {
            f"{part}{moment}": kind
            for moment in (1, 2)
            for part, kind in (("state", _CODES), ("absmax", _SCALES), ("qmap", _TABLES[moment - 1]))
        }
        | _OF_WEIGHTS,
        _looked_up(exp_avg=("state1", "absmax1", "qmap1"), exp_avg_sq=("state2", "absmax2", "qmap2")),
        blocks=(256, 2048),  # the latter before 0.45
        products=(
            ("state1", "absmax1", "qmap1", _LARGEST_M),
            ("state2", "absmax2", "qmap2", _NORMAL.max),
        ),
        ignored=frozenset({"unorm_vec"}),
    ),
    Dialect(
        "torchao 8-bit",
        {
            f"{moment}.{part}": kind
            for moment, table in zip(("exp_avg", "exp_avg_sq"), _TABLES, strict=True)
            for part, kind in (("codes", _CODES), ("scale", _SCALES), ("qmap", table))
        }
        | _OF_WEIGHTS,
        _looked_up(
            exp_avg=("exp_avg.codes", "exp_avg.scale", "exp_avg.qmap"),
            exp_avg_sq=("exp_avg_sq.codes", "exp_avg_sq.scale", "exp_avg_sq.qmap"),
        ),
        blocks=None,
        products=(
            ("exp_avg.codes", "exp_avg.scale", "exp_avg.qmap", _LARGEST_M),
            ("exp_avg_sq.codes", "exp_avg_sq.scale", "exp_avg_sq.qmap", _NORMAL.max),
        ),
    ),
)

OTHERS = (
    ("momentum_buffer", None, "SGD's or Muon's"),
    ("exp_inf", None, "Adamax's"),
    ("mu_product", None, "NAdam's"),
    ("square_avg", None, "RMSprop's"),
    ("sum", None, "Adagrad's"),
    ("exp_avg_sq_row", None, "Adafactor's"),
    ("exp_avg", "exp_avg_sq", "Lion's"),
    ("max1", None, "of bitsandbytes' 8-bit optimizers without blocks, which it has given up"),
    ("state1", "state2", "of a bitsandbytes optimizer with one moment: Lion, SGD, RMSprop or Adagrad"),
)
"""What other optimizers keep, by what only theirs has and lacks: (present, absent, whose)."""

NOT_OURS = ("mu_product",)
"""What makes a whole AdamW's state another optimizer's. Under other names a wrapper may keep its own."""
