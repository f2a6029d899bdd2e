"""Random damage to state_dicts and to the bytes of files: what fuzzing does to them."""

from __future__ import annotations

import json
import math
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

StateDict = dict[str, Any]


class Plain(Tensor):
    """A subclass whose numbers are where a tensor's are."""


# --- Tensors ----------------------------------------------------------------------------------------------

NUMBERS = (math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 1e30, -1e30, 1e-42, 3e-5, 2.0, 1e300)
STRANGE: tuple[Any, ...] = (
    None,
    [],
    {},
    (),
    "x",
    "",
    True,
    3,
    -1,
    0.5,
    math.nan,
    10**400,
    1j,
    b"x",
    object,
    {1},
)


def with_number(tensor: Tensor, rng: random.Random) -> Tensor:
    flat = tensor.clone().reshape(-1)
    for _ in range(rng.choice((1, 1, 5))):
        value = rng.choice(NUMBERS)
        if flat.numel() and (flat.is_floating_point() or (math.isfinite(value) and abs(value) < 100)):
            flat[rng.randrange(flat.numel())] = value
    return flat.reshape(tensor.shape)


def with_bytes(tensor: Tensor, rng: random.Random) -> Tensor:
    made = tensor.clone(memory_format=torch.contiguous_format)
    raw = made.view(-1).view(torch.uint8) if made.numel() else made
    for _ in range(min(raw.numel(), 3)):
        raw[rng.randrange(raw.numel())] = rng.randrange(256)
    return made


def relaid(tensor: Tensor, _: random.Random) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor.repeat_interleave(2)[::2]


TENSORS: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    with_number,
    with_number,
    with_bytes,
    relaid,
    lambda t, _: t.to("meta"),
    lambda t, _: t.to_sparse(),
    lambda t, _: t.reshape(1, -1).to_sparse_csr() if t.dtype is not torch.bool else t,
    lambda t, _: torch.nested.nested_tensor([t, t]),
    lambda t, _: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    lambda t, _: TwoTensor(t, t),
    lambda t, _: FakeTensorMode().from_tensor(t.clone()),
    lambda t, _: t.clone().as_subclass(Plain),
    lambda t, _: t[:-1] if t.ndim else t[None],
    lambda t, _: t.reshape(-1),
    lambda t, _: t.T if t.ndim == 2 else t.reshape(1, -1),
    lambda t, _: t.reshape(-1)[:1].expand(t.shape) if t.numel() else t,
    lambda t, _: t.new_empty(0),
    lambda t, _: torch.zeros_like(t),
    lambda t, _: t.tolist(),
    lambda t, _: t.cpu().float().numpy(),
    lambda t, r: t.to(r.choice((torch.float64, torch.float16, torch.bfloat16, torch.float32))),
    lambda t, r: t.to(r.choice((torch.int32, torch.uint8, torch.int8, torch.bool, torch.complex64))),
    lambda t, _: t.float().requires_grad_(),
    lambda t, _: torch.complex(t.float(), t.float()).conj(),
    lambda t, _: t.float()._neg_view(),
    lambda t, _: torch.nn.Parameter(t.float()),
    lambda t, r: r.choice(STRANGE),
)


def tensor_of(entry: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A dict and the key of a tensor in it."""
    found = [(entry, key) for key, value in entry.items() if isinstance(value, Tensor)]
    for value in entry.values():
        if isinstance(value, dict):
            found += [(value, key) for key, inner in value.items() if isinstance(inner, Tensor)]
    return rng.choice(found) if found else None


def a_tensor(state_dict: StateDict, rng: random.Random) -> None:
    place = tensor_of(rng.choice(list(state_dict["state"].values())), rng)
    if place is not None:
        holder, key = place
        if hasattr(holder[key], "codes"):  # torchao's
            part = rng.choice(("codes", "scale", "qmap"))
            damaged = rng.choice(TENSORS)(getattr(holder[key], part), rng)
            setattr(holder[key], part, damaged)
        else:
            holder[key] = rng.choice(TENSORS)(holder[key], rng)


# --- Containers -------------------------------------------------------------------------------------------


def a_key(state_dict: StateDict, rng: random.Random) -> None:
    entry = rng.choice(list(state_dict["state"].values()))
    key = rng.choice(list(entry))
    what = rng.randrange(4)
    if what == 0:
        del entry[key]
    elif what == 1:
        entry[rng.choice(("exp_avg2", 7, None, (1, 2), "", "step.step"))] = entry.pop(key)
    elif what == 2:
        entry[rng.choice(("ema", "slow_weights", 5, ("a", 1)))] = rng.choice(
            (torch.ones(3), 1, "x", None, [1])
        )
    else:
        other = rng.choice(list(entry))
        entry[key], entry[other] = entry[other], entry[key]


def a_step(state_dict: StateDict, rng: random.Random) -> None:
    values = (math.nan, -1, 2.5, 1e30, "2", True, None, 7, 2**24 + 1, 10**400, torch.tensor(2), torch.ones(2))
    tensors = (
        torch.tensor(math.nan),
        torch.tensor(1j),
        torch.tensor(True),
        torch.ones(1),
        torch.ones((), device="meta"),
    )
    rng.choice(list(state_dict["state"].values()))["step"] = rng.choice((*values, *tensors))


def an_entry(state_dict: StateDict, rng: random.Random) -> None:
    state = state_dict["state"]
    key = rng.choice(list(state))
    what = rng.randrange(4)
    if what == 0:
        state[key] = rng.choice((*STRANGE, torch.ones(2)))
    elif what == 1:
        del state[key]
    elif what == 2:
        state[rng.choice((77, str(key), None, "wrapper", (1,), 2.5))] = state.pop(key)
    else:
        other = rng.choice(list(state))
        state[key], state[other] = state[other], state[key]


def a_group(state_dict: StateDict, rng: random.Random) -> None:
    groups = state_dict["param_groups"]
    index = rng.randrange(len(groups))
    what = rng.randrange(5)
    if what == 0:
        groups[index] = rng.choice(STRANGE)
    elif what == 1:
        groups.pop(index)
    elif what == 2:
        groups.append(dict(groups[index]))
    elif what == 3:
        groups[index].pop(rng.choice(list(groups[index])))
    else:
        params = list(groups[index]["params"])
        strange = ([*params, 99], params[1:], [params[0]] * len(params), [[] for _ in params], None, "ab", 5)
        groups[index]["params"] = rng.choice(strange)


def a_number(state_dict: StateDict, rng: random.Random) -> None:
    """Of the hyperparameters; not one that is only large."""
    group = rng.choice(state_dict["param_groups"])
    if isinstance(group, dict):
        key = rng.choice(
            ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "state_bits", "param_names", "x")
        )
        tensors = (torch.ones(2), torch.ones((), device="meta"), torch.tensor(True), torch.tensor(0.5))
        group[key] = rng.choice((*STRANGE, *tensors, (0.9,), (0.9, 1.0), (0.9, None), ("a", "b"), (0.5, 0.9)))


def the_whole(state_dict: StateDict, rng: random.Random) -> None:
    key = rng.choice(("state", "param_groups", "adamw_triton_version"))
    if rng.random() < 0.3:
        state_dict.pop(key, None)
    else:
        state_dict[key] = rng.choice((*STRANGE, 2, torch.ones(2)))


KINDS = (a_tensor, a_tensor, a_tensor, a_tensor, a_key, a_step, an_entry, a_group, a_number, the_whole)


def damage(state_dict: StateDict, rng: random.Random) -> str:
    """Change a state_dict in place; what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(KINDS)
        done.append(kind.__name__)
        try:
            kind(state_dict, rng)
        except Exception as error:  # torch cannot make that of this tensor, or the first damage was too great
            done[-1] += f" ({type(error).__name__})"
    return ", ".join(done)


# --- Files ------------------------------------------------------------------------------------------------


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    near = rng.choice((200, 2000, len(data)))  # where headers are
    for _ in range(rng.choice((1, 1, 8, 64))):
        at = rng.randrange(min(near, len(data)))
        data[at if rng.random() < 0.7 else -1 - at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def blank(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at, length = rng.randrange(len(data)), rng.randrange(1, 500)
    data[at : at + length] = bytes(rng.choice((0, 255)) for _ in data[at : at + length])
    path.write_bytes(data)


def move(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data))
    path.write_bytes(data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at + rng.randrange(3) :])


def header(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    length = rng.choice((0, 1, 2**31, 2**40, 2**63))
    magic = rng.choice((struct.pack("<Q", length), b"PK\x03\x04", b"\x80\x02", b"\x80\x05", b"GGUF", b""))
    path.write_bytes(magic + data[len(magic) :])


def inside(path: Path, rng: random.Random) -> None:
    """The pickle of a zip file, or the JSON of a safetensors file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        name = next(name for name in members if name.endswith("data.pkl"))
        if rng.random() < 0.3:
            del members[rng.choice(list(members))]
        else:
            data = bytearray(members[name])
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            members[name] = bytes(data)
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        return None
    if path.suffix != ".safetensors":
        return flip(path, rng)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].decode()
    described = json.loads(text)
    ours = json.loads(described["__metadata__"]["adamw_triton"])
    for _ in range(rng.choice((1, 2))):
        holder: Any = ours
        while isinstance(holder, dict | list) and holder:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if rng.random() < 0.4 or not isinstance(holder[key], dict | list):
                holder[key] = rng.choice((None, [], {}, "x", -1, 2.5, True, math.nan, 10**30, [1, 1], [0, 5]))
                break
            holder = holder[key]
    described["__metadata__"]["adamw_triton"] = json.dumps(ours)
    changed = json.dumps(described).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


BYTES = (cut, flip, flip, blank, move, header, inside, inside)
