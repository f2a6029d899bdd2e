"""State in and out of the optimizer: checks, and placing loaded tensors into the flat buffers.

torch's ``load_state_dict`` casts every tensor but ``step`` to its parameter's dtype, 8-bit codes
included. So tensors go through it in boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamw_triton.arguments import BLOCK_SIZES, name_of
from adamw_triton.state import Blockwise8, Float32, Format, Slot, as_real


@dataclass(frozen=True)
class _Box:
    content: Any


def box(_optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A ``load_state_dict`` pre-hook: a shallow copy with each parameter's state in a box."""
    boxed = {
        key: _Box(value) if isinstance(value, dict) else value for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": boxed}


def unbox(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: dict(value.content) if isinstance(value, _Box) else value for key, value in state.items()}


def check(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse what ``place`` could not take. What torch's own ``load_state_dict`` checks is left to it."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    names = [
        (param, name_of(group, group_index, index))
        for group_index, group in enumerate(groups)
        for index, param in enumerate(group["params"])
    ]
    for index, (param, name) in zip(saved, names, strict=False):
        if state_dict["state"].get(index):
            _check_entry(state_dict["state"][index], param, name)


def _check_entry(entry: Mapping[str, Any], param: Tensor, name: str) -> None:
    state_format = format_of(entry, as_real(param).numel(), name)
    for array in state_format.arrays:
        value = entry[array.name]
        if not isinstance(value, Tensor):
            raise ValueError(f"state of {name}: {array.name} is a {type(value).__name__}, not a tensor")
        shapes: tuple[tuple[int, ...], ...] = (tuple(param.shape), tuple(as_real(param).shape))
        if array.per > 1:
            shapes = ((-(-as_real(param).numel() // array.per),),)
        if tuple(value.shape) not in shapes:
            raise ValueError(
                f"state of {name}: {array.name} has shape {tuple(value.shape)}, expected {shapes[0]}"
            )
        if array.dtype in (torch.int8, torch.uint8) and value.dtype is not array.dtype:
            raise ValueError(f"state of {name}: {array.name} has dtype {value.dtype}, expected {array.dtype}")


def format_of(entry: Mapping[str, Any], numel: int, name: str) -> Format:
    """The format that a parameter's state is in."""
    keys = set(entry) - {"step"}
    formats: Iterable[Format] = (Float32(), Float32(amsgrad=True), *map(Blockwise8, BLOCK_SIZES))
    for state_format in formats:
        if keys == {array.name for array in state_format.arrays}:
            scales = state_format.arrays[1]
            if scales.per == 1 or _numel(entry[scales.name]) == -(-numel // scales.per):
                return state_format
    if "step" not in entry or keys != {array.name for array in Blockwise8().arrays}:
        raise ValueError(
            f"state of {name} has entries {sorted(map(str, entry))}; known are those of "
            "torch.optim.AdamW (step, exp_avg, exp_avg_sq, max_exp_avg_sq) and of this package's 8-bit state"
        )
    raise ValueError(
        f"state of {name}: {_numel(entry['exp_avg_scales'])} scales for {numel} elements fit no block size "
        f"of {BLOCK_SIZES}"
    )


def place(entry: Mapping[str, Any], slot: Slot) -> None:
    """Copy a parameter's state, of any format, into its slot."""
    step = entry.get("step", 0)
    slot.buffer.steps[slot.index] = float(step)
    source = format_of(entry, slot.numel, slot.name)
    loaded = {array.name: entry[array.name] for array in source.arrays}
    flat = {
        array.name: _flat(loaded[array.name], slot) if array.per == 1 else loaded[array.name]
        for array in source.arrays
    }
    into = slot.flat()
    if {array.name for array in slot.format.arrays} <= set(flat) and (
        source == slot.format or not isinstance(source, Blockwise8)
    ):
        for name, target in into.items():
            target.copy_(flat[name])
        return
    where = next(iter(into.values())).device  # paged: the host, for the moments may not fit the GPU
    moments = source.decode({name: tensor.to(where) for name, tensor in flat.items()})
    moments.setdefault("max_exp_avg_sq", moments["exp_avg_sq"])
    slot.format.encode(moments, into)


def _flat(tensor: Tensor, slot: Slot) -> Tensor:
    """One-dimensional, in the slot's memory order."""
    real = as_real(tensor)
    if real.stride() != slot.strides:
        ordered = torch.empty_strided(real.shape, slot.strides, dtype=real.dtype, device=real.device)
        real = ordered.copy_(real)
    return real.as_strided((slot.numel,), (1,))


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else -1
