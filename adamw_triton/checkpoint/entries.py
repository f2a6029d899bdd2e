"""One parameter's state as somebody saved it: recognised, checked, decoded.

An *entry* is what a state_dict holds for one parameter. What has a name of some dialect is the optimizer's:
it is flattened into parts, recognised by their names, and checked against its dialect; decoded, it gives fp32
moments in the parameter's shape. Under any other key it is somebody else's, a wrapper's, and kept as it is.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton.arguments import as_number
from adamw_triton.checkpoint.dialects import DIALECTS, NOT_OURS, OTHERS, Dialect, Part
from adamw_triton.state.buffers import NORM
from adamw_triton.state.formats import KEPT, Format, Moments, as_real, is_dense
from adamw_triton_kernels.work import REMAINDER

Entry = Mapping[Any, Any]

_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"  # from 0.50 on, for FSDP
_TORCHAO_PARTS = ("codes", "scale", "qmap")
GATHERED = f"{REMAINDER}_fp32"
"""What bf16 weights lack, as fp32 numbers: for who gathers only tensors of one dtype. Under its own name it
would be taken for one that somebody has rounded."""
_NAMES = frozenset({"step", NORM, GATHERED, _BITSANDBYTES_WRAPPER, *NOT_OURS}).union(
    *({*dialect.parts, *dialect.ignored} for dialect in DIALECTS)
)

_MERGED = (
    "torch's set_optimizer_state_dict(full_state_dict=True) puts what it loads beside what the optimizer "
    "already shows, so that it loads no variant but the one that was saved. optimizer.load_state_dict(full), "
    "with the whole state dict on every rank, loads any"
)

MOST_STEPS = 2**31
"""fp32 counts by ones up to 2**24, and bias corrections are 1 long before."""


_CAST = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("adamw_triton")


class Saved(NamedTuple):
    """An entry that was understood."""

    dialect: Dialect
    step: float
    parts: dict[str, Tensor]
    block: int
    norm: float = math.inf
    """Running average of the gradient's; infinite without."""

    @property
    def scalars(self) -> dict[str, Tensor]:
        """As an entry has them."""
        found = {"step": self.step} | ({} if self.norm == math.inf else {NORM: self.norm})
        return {name: torch.tensor(x, dtype=torch.float32, device="cpu") for name, x in found.items()}

    @property
    def elements(self) -> Tensor:
        """A part in the parameter's shape, as real numbers. It has the memory order of all coded ones."""
        first = next(key for key, part in self.dialect.parts.items() if part.kind == "elements")
        return as_real(self.parts[first])

    @property
    def format(self) -> Format | None:
        """The format of ours that the moments are in, code by code."""
        return self.dialect.format(self.block) if self.dialect.format else None

    @property
    def kept(self) -> dict[str, Tensor]:
        """Of the parts, what goes with the weight."""
        return {name: self.parts[name] for name in KEPT if name in self.parts}

    def to(self, device: torch.device) -> Saved:
        return self._replace(parts={key: part.to(device) for key, part in self.parts.items()})

    def moments(self) -> Moments:
        """fp32, in the parameter's shape as real numbers."""
        if not self.dialect.coded:
            return self.dialect.decode(self.parts, 0)
        like = self.elements
        flat = self.dialect.decode({key: flat_of(part) for key, part in self.parts.items()}, self.block)
        strides = like.stride() if is_dense(like) else torch.empty(like.shape, device="meta").stride()
        return {key: moment.as_strided(like.shape, strides) for key, moment in flat.items()}


def has_state(entry: object) -> bool:
    """Whether an entry has an optimizer's state, or anything that takes its place."""
    if not isinstance(entry, Mapping):
        return True
    return any(key in _NAMES for key in entry)


def others_of(entry: Entry) -> dict[Any, Any]:
    """What is in an entry beside the optimizer's state."""
    return {key: value for key, value in entry.items() if key not in _NAMES}


def read(entry: object, name: str, shape: torch.Size | None = None) -> Saved:
    """Recognise an entry, and check its parts' names, dtypes and shapes. Nothing is written to.

    Args:
        name: what messages call the parameter.
        shape: the parameter's, as real numbers; None to take the entry's word for it.

    Raises:
        ValueError: naming the parameter and what is wrong.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"state of {name} is a {type(entry).__name__}, not a dict")
    parts = _flatten(entry)
    if GATHERED in parts:
        parts[REMAINDER] = _remainder(parts.pop(GATHERED), name)
    keys = set(parts) - {"step", NORM}
    dialect = next((dialect for dialect in DIALECTS if dialect.knows(keys)), None)
    if dialect is None or "step" not in parts:
        raise ValueError(_not_known({**others_of(entry), **parts}, name))
    step = _step(parts["step"], name)
    plain = {
        key: _plain(key, parts[key], part.dtypes, name)
        for key, part in dialect.parts.items()
        if key in parts and not (key in KEPT and _went_elsewhere(parts[key], part))
    }
    for key, part in dialect.parts.items():
        if part.kind == "scales":  # perhaps in rows
            plain[key] = plain[key].to(part.dtypes[0]).flatten()
    saved = Saved(dialect, step, plain, 0, _norm(parts.get(NORM, math.inf), name))
    return saved._replace(block=_check_shapes(saved, name, saved.elements.shape if shape is None else shape))


def check_others(entry: Entry, name: str) -> None:
    """Refuse the state of another optimizer where there is none of an AdamW's.

    Raises:
        ValueError: naming the parameter and whose state it is.
    """
    if any(present in entry for present, _, _ in OTHERS):
        raise ValueError(_not_known(entry, name))


def check_values(saved: Saved, name: str) -> None:
    """Refuse numbers that no optimizer writes: not finite in fp32, or negative where there are squares.

    Raises:
        ValueError: naming the parameter.
    """
    for key, value in saved.parts.items():
        part = saved.dialect.parts[key]
        if value.numel() and (wrong := _wrong(value, part)):
            raise ValueError(f"state of {name}: {key} {wrong}")
    for codes, scales, others, highest in saved.dialect.products:
        largest = _largest(saved.parts[scales]) * _largest(saved.parts[others])
        if largest > highest:
            raise ValueError(
                f"state of {name}: {scales} times {others} make of {codes} values up to {largest:.3g}, above "
                f"{highest:.3g}"
            )


def _wrong(value: Tensor, part: Part) -> str | None:
    """What is wrong with a part's values. They are read a few times, and not copied."""
    if part.kind == "elements" and not (value.is_floating_point() or value.is_complex()):
        below = part.lowest is not None and int(value.amin()) < part.lowest
        return f"has codes below {part.lowest}" if below else None
    lowest, highest = (float(edge) for edge in as_real(value).aminmax())
    what = {"elements": "has values", "scales": "has scales", "table": "is a code table with values"}[
        part.kind
    ]
    least = -part.highest if part.lowest is None else part.lowest
    if not (least <= lowest and highest <= part.highest):  # NaN is neither
        outside = f"outside {least:.3g} to {part.highest:.3g}"
        negative = ", infinite or negative" if part.lowest == 0 else " or infinite"
        return f"{what} that are NaN{negative}: {lowest:.3g} to {highest:.3g}, {outside}"
    if part.smallest and bool(((value > 0) & (value < part.smallest)).any()):
        return f"{what} below {part.smallest:.3g}, too small to decode"
    return None


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().amax()) if tensor.numel() else 0.0


def flat_of(tensor: Tensor) -> Tensor:
    """One-dimensional, in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)


def _flatten(entry: Entry) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in _NAMES:
            continue
        if key == _BITSANDBYTES_WRAPPER and isinstance(value, Mapping):
            parts.update(value)
        elif key == REMAINDER and _is_pairs(value):
            parts[key] = _of_pairs(value)
        elif isinstance(value, Tensor) and hasattr(value, "codes"):  # a quantized subclass
            found = {part: getattr(value, part) for part in _TORCHAO_PARTS if hasattr(value, part)}
            parts.update({f"{key}.{part}": tensor for part, tensor in found.items()})
        else:
            parts[key] = value
    return parts


def _is_pairs(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.uint8 and value.shape[-1:] == (2,)


def _of_pairs(pairs: Tensor) -> Tensor:
    """Where they are and in their memory order, if 16-bit integers may lie there."""
    try:
        return pairs.view(torch.int16).squeeze(-1)
    except RuntimeError:
        return pairs.clone(memory_format=torch.contiguous_format).view(torch.int16).squeeze(-1)


def _went_elsewhere(kept: Any, part: Part) -> bool:
    """Whether what goes with an exact weight has been through an optimizer that casts what it does not know,
    as torch's do: it is no longer of this weight, which has been stepped without it."""
    cast = isinstance(kept, Tensor) and kept.dtype not in part.dtypes and kept.dtype in _CAST
    if cast:
        _say_cast()
    return cast


def _remainder(gathered: Any, name: str) -> Tensor:
    numbers = _plain(GATHERED, gathered, (torch.float32,), name)
    found = numbers.to(torch.int16)
    if not torch.equal(found.float(), numbers):
        raise ValueError(f"state of {name}: {GATHERED} has values that are no 16-bit integers")
    return found


@functools.cache
def _say_cast() -> None:
    _log.warning("exact weights have been through another optimizer, and begin anew at the weights there are")


def _not_known(parts: Entry, name: str) -> str:
    keys = set(map(str, parts)) - {"step", NORM}
    what = f"state of {name} has entries {sorted(map(str, parts))}"
    for present, absent, whose in OTHERS:
        if present in keys and absent not in keys:
            return f"{what}: that is the state {whose}. {_known()}"
    if {"exp_avg", "exp_avg_codes"} <= keys:
        return f"{what}: 32-bit and 8-bit state at once. {_MERGED}"
    closest = max(DIALECTS, key=lambda dialect: len(keys & set(dialect.parts)))
    missing = sorted({"step", *closest.parts} - set(parts) - closest.optional)
    unknown = sorted(keys - set(closest.parts) - closest.ignored)
    said = [
        f"{label} {', '.join(names)}"
        for label, names in (("unknown:", unknown), ("missing:", missing))
        if names
    ]
    return f"{what}; {'; '.join(said)}. {_known()}"


def _known() -> str:
    return "Known are " + "; ".join(
        f"{dialect.name} ({', '.join(['step', *(key for key in dialect.parts if key not in KEPT)])})"
        for dialect in DIALECTS
    )


def _step(value: Any, name: str) -> float:
    count = _number("step", value, name)
    if count is None or not 0 <= count <= MOST_STEPS or count != int(count):
        raise ValueError(f"state of {name}: step is {value!r}, expected a count of steps up to 2**31")
    return count


def _norm(value: Any, name: str) -> float:
    norm = _number(NORM, value, name)
    if norm is None or not norm > 0:
        raise ValueError(f"state of {name}: {NORM} is {value!r}, expected a number > 0")
    return norm


def _number(key: str, value: Any, name: str) -> float | None:
    """None if it is none."""
    if isinstance(value, Tensor):
        value = _plain(key, value, None, name)
        value = value.item() if value.numel() == 1 else None
    return as_number(value)


def _plain(key: str, value: Any, dtypes: tuple[torch.dtype, ...] | None, name: str) -> Tensor:
    """The tensor without its class and history, its numbers in its memory."""
    what = f"state of {name}: {key}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is a {type(value).__name__}, not a tensor")
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ValueError(f"{what} is a {type(value).__name__}, not a plain tensor: gather it first")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(f"{what} has layout {layout}, expected torch.strided: pass a dense tensor")
    if value.is_meta:
        raise ValueError(f"{what} is on the meta device: it has no values")
    if dtypes is not None and value.dtype not in dtypes:
        raise ValueError(f"{what} has dtype {value.dtype}, expected {' or '.join(map(str, dtypes))}")
    plain: Tensor = value.detach().as_subclass(Tensor)
    if plain._is_zerotensor():
        plain = plain.clone()
    return plain.resolve_conj().resolve_neg()


def _check_shapes(saved: Saved, name: str, shape: torch.Size) -> int:
    """The block size."""
    dialect, parts = saved.dialect, saved.parts
    numel = shape.numel()
    kinds = {key: dialect.parts[key].kind for key in parts}
    for key, part in parts.items():
        if kinds[key] == "elements" and as_real(part).shape != shape:
            raise ValueError(f"state of {name}: {key} has shape {tuple(part.shape)}, expected {tuple(shape)}")
        if kinds[key] == "table" and part.shape != (256,):
            raise ValueError(f"state of {name}: {key} has shape {tuple(part.shape)}, expected (256,)")
    if not dialect.coded:
        return 0
    codes = [part for key, part in parts.items() if kinds[key] == "elements"]
    if any(code.stride() != codes[0].stride() for code in codes):
        raise ValueError(f"state of {name}: its codes lie in different memory orders")
    if not dialect.format and not codes[0].is_contiguous():
        # bitsandbytes takes memory for row-major on GPUs, and the strides at their word on CPUs.
        raise ValueError(f"state of {name}: codes of {dialect.name} must be contiguous to be understood")
    scales = {key: part for key, part in parts.items() if kinds[key] == "scales"}
    count = next(iter(scales.values())).numel()
    if any(part.shape != (count,) for part in scales.values()):
        shapes = ", ".join(f"{key} {tuple(part.shape)}" for key, part in scales.items())
        raise ValueError(f"state of {name}: scales of different or wrong shapes: {shapes}")
    if dialect.blocks is None and count and numel % count == 0:
        return numel // count
    for block in dialect.blocks or ():
        if count == -(-numel // block):
            return block
    sizes = "that divides them" if dialect.blocks is None else f"of {dialect.blocks}"
    raise ValueError(f"state of {name}: {count} scales for {numel} elements fit no block size {sizes}")
