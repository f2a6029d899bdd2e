"""Checkpoints of an AdamW's state from one form to another, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamw_triton.arguments import check_group
from adamw_triton.checkpoint import files
from adamw_triton.checkpoint.entries import Saved, check_others, check_values, has_state, others_of, read
from adamw_triton.checkpoint.files import CheckpointError, Scratch
from adamw_triton.checkpoint.loading import check_form, check_keys, check_numbers
from adamw_triton.checkpoint.saving import VERSION, VERSION_KEY
from adamw_triton.state.formats import Blockwise8, Moments
from adamw_triton.tensors import named

Track = Callable[[Iterable[Any]], Iterable[Any]]
Group = dict[str, Any]

_OURS: Group = {"amsgrad": False, "maximize": False}
_FOREIGN = ("alpha", "t_alpha", "t_beta3")  # bitsandbytes', of optimizers that are no AdamW


@dataclass(frozen=True)
class Form:
    """What a checkpoint is converted to."""

    keeps_codes: bool
    """8-bit state stays 8-bit; everything else is fp32 under torch.optim.AdamW's names."""
    group: Callable[[Group], Group]
    extra: Mapping[str, Any]


def _our_group(group: Group) -> Group:
    return {**_OURS, **{key: value for key, value in group.items() if key not in _FOREIGN}}


def _torch_group(group: Group) -> Group:
    theirs = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    kept = {key: value for key, value in group.items() if key not in (*_FOREIGN, "state_bits")}
    return {**theirs, **kept, "decoupled_weight_decay": theirs.get("decoupled_weight_decay", True)}


FORMS = {
    "native": Form(True, _our_group, {VERSION_KEY: VERSION}),
    "portable": Form(False, _our_group, {}),
    "torch": Form(False, _torch_group, {}),
}


def convert(source: Path, target: Path, to: str, track: Track = iter) -> str:
    """Read ``source``, of any dialect, and write it to ``target`` in a form of ``FORMS``. What others keep in
    the state stays as it is, if the file can hold it.

    Decoded tensors of some size wait in files beside ``target``, not in memory: the disk needs room for
    two of it.

    Args:
        track: what shows the progress over the parameters.

    Returns:
        What was done, in a line.

    Raises:
        CheckpointError: what is wrong with the file, and with which parameter.
        OSError: a file cannot be read or written.
    """
    if target.suffix not in files.ENDINGS:
        raise CheckpointError(
            f"{target} has {f'the ending {target.suffix}' if target.suffix else 'no ending'}, and what is "
            f"written tells itself by one: {', '.join(files.ENDINGS)}"
        )
    if not target.parent.is_dir():
        raise CheckpointError(f"there is no folder {str(target.parent)!r} to write {target.name} into")
    form = FORMS[to]
    state_dict = files.load(source)
    try:
        check_form(state_dict)
        check_keys(state_dict)
        for index, group in enumerate(state_dict["param_groups"]):
            try:
                check_numbers(group)
                check_group({"amsgrad": False, **group}, default_bits=32)
            except ValueError as error:
                raise ValueError(f"param_groups[{index}]: {error}") from error
        converted = _converted(state_dict, form, Scratch(target.parent), track)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    files.save(converted, target)
    return f"{target}: {len(converted['state'])} parameters, {to}, {target.stat().st_size / 2**20:,.1f} MiB"


def _converted(state_dict: Mapping[str, Any], form: Form, scratch: Scratch, track: Track) -> dict[str, Any]:
    groups, old = state_dict["param_groups"], state_dict["state"]
    names = dict(named(groups))
    state = {}
    for key in track(list(old)):
        entry = old[key]
        if key not in names:
            state[key] = entry
        elif has_state(entry):
            saved = read(entry, names[key])
            check_values(saved, names[key])
            state[key] = {**saved.scalars, **_tensors(saved, form, scratch), **others_of(entry)}
        elif entry:
            check_others(entry, names[key])
            state[key] = dict(entry)
    return {"state": state, "param_groups": [form.group(group) for group in groups], **form.extra}


def _tensors(saved: Saved, form: Form, scratch: Scratch) -> dict[str, Tensor]:
    if form.keeps_codes and saved.format is not None:
        return saved.parts
    if form.keeps_codes and saved.dialect.coded:
        return _encoded(saved.moments(), scratch)
    return _kept(saved.moments(), saved, scratch)


def _encoded(moments: Moments, scratch: Scratch) -> dict[str, Tensor]:
    """Other optimizers' 8-bit state in our codes. They have no memory order but the contiguous one."""
    state_format = Blockwise8()
    shape = moments["exp_avg"].shape
    into = {}
    for array in state_format.arrays:
        entries = shape if array.per == 1 else torch.Size([-(-shape.numel() // array.per)])
        into[array.name] = scratch.empty(entries, array.dtype).zero_()
    flat = {key: moment.reshape(-1) for key, moment in moments.items()}
    state_format.encode(flat, {name: tensor.view(-1) for name, tensor in into.items()})
    return into


def _kept(moments: Moments, saved: Saved, scratch: Scratch) -> dict[str, Tensor]:
    """Those that are not in ``source`` as they are, out of memory."""
    there = {part.data_ptr() for part in saved.parts.values()}
    kept = {}
    for key, moment in moments.items():
        if moment.data_ptr() not in there:
            moment = scratch.empty(moment.shape, moment.dtype).copy_(moment)
        is_complex = any(part.is_complex() for part in saved.parts.values())
        kept[key] = torch.view_as_complex(moment) if is_complex else moment
    return kept
