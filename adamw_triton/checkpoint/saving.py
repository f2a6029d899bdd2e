"""State out of the optimizer.

The native form is exact, and made of views: no memory is taken. ``torch.save`` writes the whole storage of
every tensor it meets, padding and all, so the views are cut to storages of their own that hold little else.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from adamw_triton.checkpoint.entries import GATHERED, Entry, has_state, others_of
from adamw_triton.checkpoint.parts import as_saved, put_together, read_part
from adamw_triton.choices import STATE_FORMATS, check_word
from adamw_triton.state.buffers import NORM, Slot, StateBuffer
from adamw_triton.state.shards import is_shard
from adamw_triton.tensors import is_flattened, named
from adamw_triton_kernels.work import REMAINDER

VERSION_KEY = "adamw_triton_version"
"""Beside "state" and "param_groups", where torch's loader and whoever rebuilds the dict pass it over. Parts
name themselves, so a state_dict without it is read as well."""
VERSION = 1

_log = logging.getLogger("adamw_triton")

_SHARED = 1 << 18
"""Elements; up to so many of neighbouring parameters share a storage. A storage costs some 200 bytes in a
file: beside this 0.1%, beside the 8-bit state of a small LoRA matrix over 1%."""


@dataclass(frozen=True)
class Writer:
    """A ``state_dict`` post-hook that gives the state its form."""

    state_format: str | None
    """None: native, but portable where native state would be lost."""
    slots: Mapping[int, Slot]
    """By id of their parameter."""

    def __post_init__(self) -> None:
        if self.state_format is not None:
            check_word("state_format", self.state_format, STATE_FORMATS)

    def __call__(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        params = named(optimizer.param_groups)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        shown = cut(optimizer.state, self.slots)
        state = dict(state_dict["state"])
        for key, (param, name) in zip(keys, params, strict=True):
            if param in shown:
                entry = shown[param]
                plain = param.is_meta or not has_state(entry)
                state[key] = entry if plain else self._formed(entry, param, name)
        version = {} if self.state_format == "portable" else {VERSION_KEY: VERSION}
        return {**state_dict, "state": state, **version}

    def _formed(self, entry: dict[str, Any], param: Tensor, name: str) -> dict[str, Any]:
        """Portable or not, and as whoever puts parts of several ranks together can take it."""
        if self._is_portable(param, entry):
            entry = {**_portable(entry, param, name), **others_of(entry)}
        if self.state_format is None and is_flattened(param) and REMAINDER in entry:
            return _of_one_dtype(entry)
        return as_saved(entry, param)

    def _is_portable(self, param: Tensor, entry: Entry) -> bool:
        if self.state_format is not None:
            return self.state_format == "portable"
        # FSDP (version 1) puts the shards of all ranks together, which only tensors of the parameter's shape
        # and of one dtype survive.
        if not is_flattened(param) or "exp_avg_codes" not in entry:
            return False
        _say_portable()
        return True


def _of_one_dtype(entry: Entry) -> dict[str, Any]:
    """For FSDP (version 1), which gathers no other. On the host, as it is twice as large."""
    rest = {key: value for key, value in entry.items() if key != REMAINDER}
    return {**rest, GATHERED: entry[REMAINDER].cpu().float()}


@functools.cache
def _say_portable() -> None:
    _log.warning(
        "state_dict(): 8-bit state of parameters that FSDP (version 1) has flattened is decoded to fp32, for "
        "its codes cannot be gathered: resuming is not bit-exact. state_dict(state_format='native') has this "
        "rank's own codes"
    )


def cut(state: Mapping[Any, Any], slots: Mapping[int, Slot]) -> defaultdict[Any, Any]:
    """The same, with copies of the entries in which each slot's views are cut to storages of their own, as
    ``torch.save`` wants them."""
    views = views_of(
        slot for slot in slots.values() if slot.param in state and slot.is_shown_by(state[slot.param])
    )
    shown: defaultdict[Any, Any] = defaultdict(dict)
    for key, entry in state.items():
        own = views.get(id(key))
        if own is not None:
            shown[key] = {**own, **others_of(entry)}
        else:
            shown[key] = dict(entry) if isinstance(entry, dict) else entry
    return shown


def views_of(slots: Iterable[Slot]) -> dict[int, dict[str, Any]]:
    """By id of the parameter, what the slot shows: views of the same memory, in storages of their own."""
    views = {}
    for run in _runs(slots):
        buffer, begin = run[0].buffer, run[0].start
        end = run[-1].start + run[-1].numel
        arrays = {
            array.name: _own_storage(buffer.arrays[array.name][begin // array.per : -(-end // array.per)])
            for array in buffer.format.arrays
        }
        for slot in run:
            views[id(slot.param)] = {
                **{name: slot.entry[name] for name in slot.scalars()},
                **slot.shaped(slot.flat(arrays, begin)),
            }
    return views


def _runs(slots: Iterable[Slot]) -> Iterator[list[Slot]]:
    """Neighbours in a buffer, of at most ``_SHARED`` elements together, or one alone. ``torch.save`` takes no
    storage for numbers of two types, so complex ones are apart from real ones; and ``dcp.async_save`` takes a
    DTensor for memory where what it has here does not begin its storage, so each shard is alone."""
    of_buffer: dict[StateBuffer, list[Slot]] = defaultdict(list)
    for slot in slots:
        of_buffer[slot.buffer].append(slot)
    for members in of_buffer.values():
        members.sort(key=lambda slot: slot.index)
        run = members[:1]
        for before, slot in itertools.pairwise(members):
            if (
                slot.index != before.index + 1
                or slot.start + slot.numel - run[0].start > _SHARED
                or slot.param.is_complex() != before.param.is_complex()
                or is_shard(slot.param)
            ):
                yield run
                run = []
            run.append(slot)
        yield run


def _own_storage(tensor: Tensor) -> Tensor:
    """The same memory, which it keeps alive, as a tensor whose storage is no larger than itself."""
    if tensor.is_meta:  # there is none
        return torch.empty_like(tensor)
    return from_dlpack(to_dlpack(tensor))


def _portable(entry: Entry, param: Tensor, name: str) -> dict[str, Any]:
    """fp32 moments under torch.optim.AdamW's names. What has to be decoded comes to the host: a GPU that
    needs 8-bit state has no room for it."""
    saved = read_part(entry, param, name)
    moments = saved.moments()
    if saved.dialect.coded:
        moments = {key: moment.cpu() for key, moment in moments.items()}
    if param.is_complex():
        moments = {key: torch.view_as_complex(moment) for key, moment in moments.items()}
    scalars = {name: entry[name] for name in ("step", NORM) if name in entry}
    return {**scalars, **put_together({**moments, **saved.kept}, param)}
