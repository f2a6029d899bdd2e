"""The exact weights of a Trainer's checkpoint folder: its weights, and what optimizer.pt keeps beside them.

A Trainer saves weights by name and the optimizer's state by number. Which number is which name is in the
groups if the optimizer was given named parameters. Else the model's architecture tells in which order they
were handed over, and all counts and shapes have to agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamw_triton.checkpoint import files, model_files
from adamw_triton.checkpoint.conversion import Track
from adamw_triton.checkpoint.entries import Saved, has_state, read
from adamw_triton.checkpoint.files import SAFETENSORS, CheckpointError
from adamw_triton.checkpoint.loading import check_form, check_keys
from adamw_triton.checkpoint.model_files import Pieces
from adamw_triton.models.architecture import CannotBuildError, Orders
from adamw_triton.models.weights import ModelFileError, read_json
from adamw_triton.state.formats import as_real, kept_with
from adamw_triton.tensors import named
from adamw_triton_kernels import weights as halves

OPTIMIZER = "optimizer.pt"

_PIECE = 1 << 20
"""Elements that are worked out at once."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What wrappers put before a model's names."""


def export(folder: Path, target: Path, orders: Orders, track: Track = iter) -> str:
    """Write the model's weights to ``target``, fp32 where they were kept exactly, everything else as it is.
    Memory does not grow with the checkpoint.

    Args:
        orders: asked where the checkpoint does not name the optimizer's parameters.
        track: what shows the progress over the weights.

    Returns:
        What was done, in a line.

    Raises:
        CheckpointError: what is wrong with which file; or it cannot be known which weight is which.
        OSError: a file cannot be read or written.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise CheckpointError(
            f"{folder} is {what}: name a Trainer's checkpoint folder, which holds the weights and {OPTIMIZER}"
        )
    if target.suffix != SAFETENSORS or target.is_dir():
        raise CheckpointError(f"{target} is no name of a {SAFETENSORS} file, which is what is written")
    if not target.parent.is_dir():
        raise CheckpointError(f"there is no folder {str(target.parent)!r} to write {target.name} into")
    main, weights = model_files.load(folder)
    try:
        state_dict = files.load(folder / OPTIMIZER)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {OPTIMIZER}, where exact weights have their other half"
        ) from error
    try:
        check_form(state_dict)
        check_keys(state_dict)
        saved = _saved(state_dict)
    except ValueError as error:
        raise CheckpointError(f"{folder / OPTIMIZER}: {error}") from error
    if not any(each.kept for each in saved.values()):
        raise CheckpointError(
            f"{folder / OPTIMIZER} keeps no exact weights (master_weights was off, or no weights had 16 "
            f"bits): those in {main} are all there is"
        )
    names = _names(folder, state_dict["param_groups"], saved, weights, orders)
    exact = {}
    for key, name in names.items():
        weight, each = weights.get(name), saved.get(key)
        if weight is not None and (each.kept if each else kept_with(weight.dtype)):
            exact[_memory(weight)] = _pieces(weight, each, f"{name!r} of {main}")
    pieces = {
        name: exact.get(_memory(weight), Pieces(weight.dtype, weight.shape, partial(_cut, weight)))
        for name, weight in weights.items()
    }
    model_files.save(pieces, target, track)
    size = target.stat().st_size / 2**20
    return f"{target}: {len(exact)} exact weights of {len(weights)}, fp32, {size:,.1f} MiB"


def _saved(state_dict: Mapping[str, Any]) -> dict[Any, Saved]:
    """The state of each parameter that has one."""
    state = state_dict["state"]
    return {
        key: read(state[key], name)
        for key, name in named(state_dict["param_groups"])
        if key in state and has_state(state[key])
    }


def _names(
    folder: Path,
    groups: Sequence[Mapping[str, Any]],
    saved: Mapping[Any, Saved],
    weights: Mapping[str, Tensor],
    orders: Orders,
) -> dict[Any, str]:
    """The name in the weights of each key of the state.

    Raises:
        CheckpointError: it is not known, or weight and state differ in shape.
    """
    keys = [list(group["params"]) for group in groups if group["params"]]
    told = [list(group.get("param_names", group["params"])) for group in groups if group["params"]]
    if all(isinstance(name, str) for group in told for name in group):
        found = _matched(keys, [[_unwrapped(name, weights) for name in group] for group in told])
        if fault := _fault(found, saved, weights):
            raise CheckpointError(f"{folder}: {fault}")
        return found
    try:
        ways = orders(_config(folder))
    except (CannotBuildError, ModelFileError) as error:
        raise CheckpointError(_unknown(folder, str(error))) from error
    why = ""
    for way in ways:
        if _sizes(way) != _sizes(keys):
            continue
        found = _matched(keys, [group for group in way if group])
        why = _fault(found, saved, weights)
        if not why:
            return found
    usual = " or ".join(str(_sizes(way)) for way in ways)
    counts = (
        f"the optimizer has groups of {_sizes(keys)} parameters, and a training of all of the model {usual}"
    )
    raise CheckpointError(_unknown(folder, why or counts))


def _sizes(groups: Sequence[Sequence[Any]]) -> list[int]:
    return [len(group) for group in groups if group]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise CannotBuildError("there is no config.json that tells the architecture")
    return read_json(path)


def _unknown(folder: Path, why: str) -> str:
    return (
        f"{folder}: which weight is which of the optimizer's parameters cannot be known: {why}. Where the "
        "model is in memory, save optimizer.master_state_dict(model); an optimizer that is given "
        "model.named_parameters() leaves the names in its checkpoints"
    )


def _matched(keys: Sequence[Sequence[Any]], names: Sequence[Sequence[str]]) -> dict[Any, str]:
    pairs = zip(keys, names, strict=True)
    return {key: name for some, theirs in pairs for key, name in zip(some, theirs, strict=True)}


def _unwrapped(name: str, weights: Mapping[str, Tensor]) -> str:
    while name not in weights and (prefix := next(filter(name.startswith, _WRAPPERS), None)):
        name = name.removeprefix(prefix)
    return name


def _fault(names: Mapping[Any, str], saved: Mapping[Any, Saved], weights: Mapping[str, Tensor]) -> str:
    """Where state and weights do not go together; empty if they do."""
    for key, each in saved.items():
        name = names[key]
        if name not in weights:
            if each.kept:
                return f"there is no weight {name!r} for parameter {key!r} of {OPTIMIZER}"
        elif as_real(weights[name]).shape != each.elements.shape:
            shapes = f"{tuple(weights[name].shape)}, its state in {OPTIMIZER} {tuple(each.elements.shape)}"
            return f"{name!r} has shape {shapes}"
    return ""


def _pieces(weight: Tensor, saved: Saved | None, name: str) -> Pieces:
    """Of an exact weight; without state it has never been stepped, and is what it is."""
    half = str(kept_with(weight.dtype))
    if saved is None:
        return Pieces(torch.float32, weight.shape, lambda: map(Tensor.float, _cut(weight)))
    if half not in saved.kept:
        raise CheckpointError(
            f"{name} has dtype {weight.dtype}, and {OPTIMIZER} keeps what goes with another "
            f"({', '.join(saved.kept)}): these are not the weights that were trained"
        )
    return Pieces(torch.float32, weight.shape, partial(_together, weight, saved.kept[half], half))


def _memory(weight: Tensor) -> tuple[Any, ...]:
    """The same for all names of a tied weight."""
    return weight.data_ptr(), weight.shape, weight.dtype


def _together(weight: Tensor, kept: Tensor, half: str) -> Iterator[Tensor]:
    for part, other in zip(_cut(weight), _cut(kept), strict=True):
        yield halves.read(part, [other], half)


def _cut(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, len(flat), _PIECE))
