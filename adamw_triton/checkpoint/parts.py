"""What of an entry is for a shard: its own part of what is distributed, or of what somebody gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from adamw_triton.arguments import BLOCK_SIZES
from adamw_triton.checkpoint.entries import Entry, Saved, has_state, others_of, read
from adamw_triton.state.formats import Blockwise8, as_real
from adamw_triton.state.shards import (
    is_shard,
    like,
    local,
    local_like,
    of_whole,
    rows_of_blocks,
    uncut,
    whole_shape,
)
from adamw_triton_kernels.work import REMAINDER

_CODES = "exp_avg_codes"
_SCALES = {array.name for array in Blockwise8().moments if array.per > 1}


def read_part(entry: object, param: Tensor, name: str) -> Saved:
    """What ``entries.read`` makes of an entry, for what of its parameter is here.

    Args:
        name: what messages call the parameter.

    Raises:
        ValueError: naming the parameter and what is wrong.
    """
    return read(_part_of(entry, param, name), name, None if is_lazy(param) else as_real(param).shape)


def _part_of(entry: Any, param: Tensor, name: str) -> Any:
    """Plain, of a shard; any other as it is."""
    if not (is_shard(param) and isinstance(entry, dict) and has_state(entry)):
        return entry
    others = others_of(entry)
    state = {key: value for key, value in entry.items() if key not in others}
    if _is_whole(state, param):
        return {**_cut(state, param, name), **others}
    here = {key: local_like(x, param) if isinstance(x, Tensor) else x for key, x in state.items()}
    return {**here, **others}


def _is_whole(state: Entry, param: Tensor) -> bool:
    """Whether somebody has gathered it."""
    plain = [value for value in state.values() if isinstance(value, Tensor) and not is_shard(value)]
    here = local(param).shape
    return any(value.dim() and value.shape == param.shape != here for value in plain)


def _cut(state: Entry, param: Tensor, name: str) -> dict[Any, Any]:
    """Codes whose blocks are not cut stay as they are; others are decoded."""
    saved = read(state, name, whole_shape(param))
    stay = saved.format is not None and param.dim() == 2 and uncut(param) % saved.block == 0
    parts = {**saved.moments(), **saved.kept} if saved.dialect.coded and not stay else saved.parts
    cut: dict[Any, Any] = dict(saved.scalars)
    for key, whole in parts.items():
        if key in saved.parts and saved.dialect.parts[key].kind == "scales":
            cut[key] = of_whole(whole.view(rows_of_blocks(param, saved.block)), param, saved.block)
        else:
            cut[key] = of_whole(whole, param)
    return cut


def as_saved(entry: dict[Any, Any], param: Tensor) -> dict[Any, Any]:
    """In the form that is saved, one for shards and for whole parameters, so that each can be loaded as the
    other: scales in rows, where rows are whole blocks, and remainders as pairs of bytes, which can be
    gathered: no collective takes int16. They are views."""
    saved = dict(entry)
    kept, codes = entry.get(REMAINDER), entry.get(_CODES)
    if isinstance(kept, Tensor) and kept.dtype is torch.int16:
        pairs = local(kept).unsqueeze(-1).view(torch.uint8)
        saved[REMAINDER] = like(param, pairs, torch.Size([*param.shape, 2]))
    if isinstance(codes, Tensor) and codes.shape == param.shape and codes.is_contiguous():
        for key in _SCALES & entry.keys():
            block, rest = divmod(codes.numel(), max(1, entry[key].numel()))
            if block in BLOCK_SIZES and not (rest or is_shard(param)):
                saved[key] = _in_rows(entry[key], param, block)
    return saved


def put_together(parts: dict[str, Tensor], param: Tensor, block: int = 0) -> dict[str, Tensor]:
    """What is here, as parts of tensors that are distributed as a shard is, where they have its shape or are
    the scales of its blocks."""
    if not is_shard(param):
        return parts
    here = local(param).shape
    whole = {key: like(param, part) if part.shape == here else part for key, part in parts.items()}
    return whole | {key: _in_rows(parts[key], param, block) for key in _SCALES & parts.keys()}


def _in_rows(scales: Tensor, param: Tensor, block: int) -> Tensor:
    """Those of a parameter whose rows are whole blocks; any others as they are."""
    here = local(param).shape
    row = uncut(param) if is_shard(param) else here[1:].numel()
    if row % block:
        return scales
    return like(param, scales.view(here[0], here[1:].numel() // block), rows_of_blocks(param, block))
