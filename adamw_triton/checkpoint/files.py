"""Checkpoint files: torch's and safetensors, read lazily and written whole or not at all.

A safetensors file holds flat tensors named ``<parameter>.<part>``; the groups, as JSON, are in its metadata.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamw_triton.state.formats import is_dense

SAFETENSORS = ".safetensors"
ENDINGS = (SAFETENSORS, ".pt", ".pth", ".bin", ".ckpt")
"""Of what is written; all others than the first are torch.save's."""

_METADATA = "adamw_triton"
_LARGE = 1 << 20  # bytes; smaller decoded tensors are not worth a file


class CheckpointError(Exception):
    """A file cannot be read, or not hold what it should."""


class _TorchaoState(Tensor):
    """Stands in for torchao's class when its files are read: only the attributes matter."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{func} of torchao's state")


_TORCHAO = [
    type("OptimState8bit", (_TorchaoState,), {"__module__": module})
    for module in (
        "torchao.optim.subclass_8bit",
        "torchao.prototype.low_bit_optim.subclass_8bit",  # before 0.9
    )
]
"""The unpickler goes by these names."""


def load(path: Path) -> Any:
    """What the file holds, on the CPU; tensors are read from the disk when they are used.

    Raises:
        CheckpointError: it is damaged, or has objects that could run code.
        OSError: it cannot be opened.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path} is no file that could be read anew, but a pipe or a device")
    return _load_safetensors(path) if path.suffix == SAFETENSORS else _load_torch(path)


def save(state_dict: dict[str, Any], path: Path) -> None:
    """Write a state_dict; ``path`` has all of it at once, or is as it was.

    Raises:
        CheckpointError: a group holds what a safetensors file cannot.
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        if path.suffix == SAFETENSORS:
            _save_safetensors(state_dict, temporary)
        else:
            try:
                torch.save(state_dict, temporary)
            except RuntimeError as error:  # a full disk, in torch's words
                raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error
            except (TypeError, AttributeError, NotImplementedError, pickle.PicklingError) as error:
                raise CheckpointError(f"{path} cannot hold what is in the state: {error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` once all is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Scratch:
    """Room for decoded tensors in files without a name, in ``folder``: they take no memory that the system
    could not take back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        nbytes = shape.numel() * dtype.itemsize
        if nbytes < _LARGE:
            return torch.empty(shape, dtype=dtype, device="cpu")
        file, name = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
        try:
            try:
                if hasattr(os, "posix_fallocate"):  # a full disk says so here, and not by a signal later
                    os.posix_fallocate(file, 0, nbytes)
            finally:
                os.close(file)
            flat = torch.from_file(name, shared=True, size=shape.numel(), dtype=dtype)
        finally:
            Path(name).unlink()
        return flat.view(shape)


def _load_torch(path: Path) -> Any:
    path.open("rb").close()  # for the system's own words if there is no such file
    try:
        with torch.serialization.safe_globals(list(_TORCHAO)):
            try:
                return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"{path} holds an object of {found[1]}"
            raise CheckpointError(f"{what}: unpickling it could run any code, so it is not loaded") from error
        raise _damaged(path, error) from error
    except Exception as error:  # damaged bytes make torch fail in any way
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = bool(lines) and not isinstance(error, pickle.UnpicklingError | LookupError)
    reason = lines[0] if told else type(error).__name__
    return CheckpointError(f"{path} is cut short, damaged or no checkpoint: {reason}")


def read_safetensors(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """What ``save`` says of a state_dict in the metadata, None if it did not write the file; and the tensors,
    read from the disk when they are used.

    Raises:
        CheckpointError: it is damaged.
        OSError: it cannot be opened.
    """
    import safetensors

    path.open("rb").close()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            return described, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # as of torch's files
        raise _damaged(path, error) from error


def _load_safetensors(path: Path) -> dict[str, Any]:
    described, tensors = read_safetensors(path)
    if described is None:
        raise CheckpointError(
            f"{path} has no {_METADATA!r} in its metadata: it was not written by adamw-triton convert"
        )
    try:
        return _assembled(described, tensors)
    except Exception as error:  # the metadata may be anything
        raise _damaged(path, error) from error


def _assembled(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    groups = described["param_groups"]
    for group in groups:
        group["betas"] = tuple(group["betas"])
    keys = {str(key): key for group in groups for key in group["params"]}
    state: dict[Any, dict[str, Any]] = {key: {} for key in keys.values()}
    for name, tensor in tensors.items():
        key, _, part = name.rpartition(".")
        if strides := described["strides"].get(name):
            tensor = _in_order(tensor, strides)
        state[keys[key]][part] = tensor
    state = {key: entry for key, entry in state.items() if entry}
    return {"state": state, "param_groups": groups, **described["others"]}


def _in_order(tensor: Tensor, strides: list[int]) -> Tensor:
    ordered = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
    if not is_dense(ordered):
        raise ValueError(f"strides {strides} for shape {tuple(tensor.shape)}")
    return torch.empty_like(ordered, device="cpu").copy_(tensor)


def _apart(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """In row-major order, each with memory of its own, as the format wants it."""
    taken = set()
    for name, tensor in named.items():
        memory = tensor.untyped_storage().data_ptr()
        shared = memory in taken
        yield name, tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        taken.add(memory)


def _save_safetensors(state_dict: Mapping[str, Any], path: Path) -> None:
    import safetensors
    from safetensors.torch import save_file

    for index, group in enumerate(state_dict["param_groups"]):
        for key, value in group.items():
            _check_json(value, f"param_groups[{index}][{key!r}]")
            if not isinstance(key, str):
                raise CheckpointError(f"param_groups[{index}] has the key {key!r}; {_NO_ROOM}")
    others = {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}
    for key, value in others.items():
        _check_json(value, f"the state_dict's {key!r}")
    named = dict(_named(state_dict))
    described = {
        "param_groups": state_dict["param_groups"],
        # Scales count blocks in memory order, which a safetensors file does not keep by itself.
        "strides": {
            name: tensor.stride()
            for name, tensor in named.items()
            if not tensor.is_contiguous() and is_dense(tensor)
        },
        "others": others,
    }
    metadata = {_METADATA: json.dumps(described, default=_number)}
    try:
        save_file(dict(_apart(named)), path, metadata=metadata)
    except (KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path.name}: {error}; {_NO_ROOM}") from error


def _named(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the state, with the name that it has in the file."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for key, entry in state_dict["state"].items():
        if key not in keys or type(key) not in (int, str) or (type(key) is int and str(key) in keys):
            raise CheckpointError(f"the state has the key {key!r}; {_NO_ROOM}")
        for part, tensor in entry.items():
            if not isinstance(part, str) or "." in part or type(tensor) is not Tensor or not _plain(tensor):
                what = f"a {type(tensor).__name__} under {part!r}"
                raise CheckpointError(f"the state of {key!r} has {what}; {_NO_ROOM}")
            yield f"{key}.{part}", tensor


def _plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested)


def _check_json(value: Any, what: str) -> None:
    try:
        json.dumps(value, default=_number)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is a {type(value).__name__}, which {_CANNOT}") from error


_CANNOT = "a safetensors file cannot hold"
_NO_ROOM = f"that {_CANNOT}: write a .pt file"


def _number(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    raise TypeError
