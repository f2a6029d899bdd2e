"""State formats. A format is data: its arrays, its alignment, how fp32 moments go in and out, and the name of
the update that works on it. It has two parts, how moments are coded and how the weight is kept. Whatever else
handles state speaks of ranges and arrays and never asks which format it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adamw_triton.state.shards import local
from adamw_triton_kernels import codes
from adamw_triton_kernels.work import MASTER, NEAREST, REMAINDER, STOCHASTIC

Moments = dict[str, Tensor]
"""fp32 ``exp_avg`` and ``exp_avg_sq`` (and ``max_exp_avg_sq``), flat."""


@dataclass(frozen=True)
class Array:
    """One of a format's arrays: ``per`` elements of the parameter share one entry."""

    name: str
    dtype: torch.dtype
    per: int = 1


class Arranged(Protocol):
    """What a buffer asks of a format."""

    @property
    def arrays(self) -> tuple[Array, ...]: ...

    @property
    def alignment(self) -> int:
        """Elements; where a parameter's range may begin."""


@dataclass(frozen=True)
class Sum:
    """No state: what the gradients of micro-batches add up to, in the dtype that they are added in."""

    dtype: torch.dtype

    alignment = 64  # 128 bytes of 16 bits each: a GPU's cache line

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (Array("grad_sum", self.dtype),)


KEPT = {REMAINDER: Array(REMAINDER, torch.int16), MASTER: Array(MASTER, torch.float32)}
"""The array that goes with a weight, by how weights are kept: of bf16 the lower half of the fp32 weight's
bits, of fp16 the fp32 weight."""

WEIGHTS = ("nearest", "stochastic", "exact")
"""How weights of 16 bits may be kept."""

_WEIGHTS_OF = {
    ("exact", torch.bfloat16): REMAINDER,
    ("exact", torch.float16): MASTER,
    ("stochastic", torch.bfloat16): STOCHASTIC,
}


@dataclass(frozen=True)
class Float32:
    """fp32 moments, under torch.optim.AdamW's names. 8 bytes an element; 12 with amsgrad."""

    amsgrad: bool = False
    weights: str = NEAREST

    name = "32bit"
    update = "adamw_32bit"
    alignment = 32  # 128 bytes: a GPU's cache line

    @property
    def moments(self) -> tuple[Array, ...]:
        names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if self.amsgrad else ())
        return tuple(Array(name, torch.float32) for name in names)

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.moments + kept_arrays(self.weights)

    def encode(self, moments: Moments, into: Mapping[str, Tensor]) -> None:
        for array in self.moments:
            into[array.name].copy_(moments[array.name])

    def decode(self, views: Mapping[str, Tensor]) -> Moments:
        return {array.name: views[array.name].float() for array in self.moments}


@dataclass(frozen=True)
class Blockwise8:
    """8-bit codes with two bf16 scales a block: 2 + 4/block bytes an element. See ``codes``."""

    block: int = 128
    weights: str = NEAREST

    name = "8bit"
    update = "adamw_8bit"

    @property
    def alignment(self) -> int:
        return self.block

    @property
    def moments(self) -> tuple[Array, ...]:
        return (
            Array("exp_avg_codes", torch.int8),
            Array("exp_avg_scales", torch.bfloat16, self.block),
            Array("exp_avg_sq_codes", torch.uint8),
            Array("exp_avg_sq_scales", torch.bfloat16, self.block),
        )

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.moments + kept_arrays(self.weights)

    def encode(self, moments: Moments, into: Mapping[str, Tensor]) -> None:
        codes.encode_8bit(moments["exp_avg"], moments["exp_avg_sq"], into, self.block)

    def decode(self, views: Mapping[str, Tensor]) -> Moments:
        m, v = codes.decode_8bit(views, self.block)
        return {"exp_avg": m, "exp_avg_sq": v}


Format = Float32 | Blockwise8

SMALLEST_8BIT = 4096
"""Tensors with fewer elements keep 32-bit state: biases and norms are few and sensitive."""


def format_for(
    numel: int,
    bits: int,
    block_size: int = 128,
    amsgrad: bool = False,
    dtype: torch.dtype = torch.float32,
    weights: str = "nearest",
    uncut: int = 0,
) -> Format:
    """Of a parameter with so many real elements, on all ranks together, of that dtype.

    Args:
        weights: one of ``WEIGHTS``.
        uncut: of a shard, elements in a row that no ranks cut: unless they are whole blocks, codes would be
            others on each number of ranks, and its state has 32 bits.
    """
    kept = _WEIGHTS_OF.get((weights, dtype), NEAREST)
    coded = bits == 8 and numel >= SMALLEST_8BIT and uncut % block_size == 0
    return Blockwise8(block_size, kept) if coded else Float32(amsgrad, kept)


def matters(weights: str, dtype: torch.dtype) -> bool:
    """Whether weights of that dtype are kept otherwise than to nearest."""
    return (weights, dtype) in _WEIGHTS_OF


def kept_with(dtype: torch.dtype) -> str | None:
    """What is kept with an exact weight of that dtype, one of ``KEPT``; None if there is nothing to keep."""
    return _WEIGHTS_OF.get(("exact", dtype))


def kept_arrays(weights: str) -> tuple[Array, ...]:
    """What goes with weights that are kept so."""
    return (KEPT[weights],) if weights in KEPT else ()


def nbytes(state_format: Arranged, numel: int) -> int:
    """Bytes of state for ``numel`` elements, rounded up to the format's alignment."""
    return _nbytes(state_format.arrays, round_up(numel, state_format.alignment))


def nbytes_of_weights(state_format: Format, numel: int) -> int:
    """The part of them that goes with the weights."""
    return _nbytes(kept_arrays(state_format.weights), round_up(numel, state_format.alignment))


def _nbytes(arrays: tuple[Array, ...], numel: int) -> int:
    return sum(numel // array.per * array.dtype.itemsize for array in arrays)


def as_real(tensor: Tensor) -> Tensor:
    """What of a tensor is here, a complex one as real numbers with a last dimension of 2: a view, but a copy
    of a lazily conjugated one. Any other as it is."""
    tensor = local(tensor)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, each once, in whatever order."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != reach:
                return tensor.numel() == 0
            reach *= size
    return True


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
