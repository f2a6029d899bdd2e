"""One parameter's state as somebody saved it: recognised, checked, decoded.

An *entry* is what a state_dict holds for one parameter. It is flattened into its parts, recognised by
their names, and checked against its dialect; decoded, it gives fp32 moments in the parameter's shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adamw_triton.checkpoint.dialects import DIALECTS, OTHERS, Dialect
from adamw_triton.state.formats import Format, Moments, as_real

Entry = Mapping[str, Any]

_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"  # from 0.50 on, for FSDP
_TORCHAO_PARTS = ("codes", "scale", "qmap")


class Saved(NamedTuple):
    """An entry that was understood."""

    dialect: Dialect
    step: float
    parts: dict[str, Tensor]
    block: int

    @property
    def elements(self) -> Tensor:
        """A part in the parameter's shape, as real numbers. It has the memory order of all coded ones."""
        first = next(key for key, part in self.dialect.parts.items() if part.kind == "elements")
        return as_real(self.parts[first])

    @property
    def format(self) -> Format | None:
        """The format of ours that the parts are in, code by code."""
        return self.dialect.format(self.block) if self.dialect.format else None

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


def read(entry: Entry, name: str, shape: torch.Size | None = None) -> Saved:
    """Recognise an entry, and check its parts' names, dtypes and shapes.

    Args:
        name: what messages call the parameter.
        shape: the parameter's, as real numbers; None to take the entry's word for it.

    Raises:
        ValueError: naming the parameter and what is wrong.
    """
    parts = _flatten(entry, name)
    keys = set(parts) - {"step"}
    dialect = next((dialect for dialect in DIALECTS if dialect.knows(keys)), None)
    if dialect is None or "step" not in parts:
        raise ValueError(_not_known(parts, name))
    step = _step(parts["step"], name)
    saved = Saved(dialect, step, {key: parts[key] for key in dialect.parts if key in parts}, 0)
    for key, part in saved.parts.items():
        _check_type(key, part, dialect.parts[key].dtypes, name)
    return saved._replace(block=_check_shapes(saved, name, saved.elements.shape if shape is None else shape))


def check_values(saved: Saved, name: str) -> None:
    """Refuse codes and scales that no optimizer writes. Reads each of them once.

    Raises:
        ValueError: naming the parameter.
    """
    for key, value in saved.parts.items():
        part = saved.dialect.parts[key]
        if part.lowest is not None and value.numel() and int(value.amin()) < part.lowest:
            raise ValueError(f"state of {name}: {key} has codes below {part.lowest}")
        if part.kind == "scales" and not (value.isfinite() & (value >= 0)).all():
            raise ValueError(f"state of {name}: {key} has scales that are NaN, infinite or negative")
        if part.kind == "table" and not value.isfinite().all():
            raise ValueError(f"state of {name}: {key} is a code table with NaN or infinite values")


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in whatever order. (None share memory: states.)"""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or reach + 1 == tensor.numel()


def flat_of(tensor: Tensor) -> Tensor:
    """One-dimensional, in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)


def _flatten(entry: Entry, name: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"state of {name} is a {type(entry).__name__}, not a dict")
    parts: dict[str, Any] = {}
    for key, value in entry.items():
        if key == _BITSANDBYTES_WRAPPER and isinstance(value, Mapping):
            parts.update(value)
        elif isinstance(value, Tensor) and hasattr(value, "codes"):  # a quantized subclass
            found = {part: getattr(value, part) for part in _TORCHAO_PARTS if hasattr(value, part)}
            parts.update({f"{key}.{part}": tensor for part, tensor in found.items()})
        else:
            parts[key] = value
    return parts


def _not_known(parts: Entry, name: str) -> str:
    keys = set(map(str, parts)) - {"step"}
    what = f"state of {name} has entries {sorted(map(str, parts))}"
    for present, absent, whose in OTHERS:
        if present in keys and absent not in keys:
            return f"{what}: that is the state {whose}. {_known()}"
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
        f"{dialect.name} ({', '.join(['step', *dialect.parts])})" for dialect in DIALECTS
    )


def _step(value: Any, name: str) -> float:
    count = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(count, int | float) or not 0 <= count < math.inf:
        raise ValueError(f"state of {name}: step is {value!r}, expected a count of steps")
    return float(count)


def _check_type(key: str, value: Any, dtypes: tuple[torch.dtype, ...], name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"state of {name}: {key} is a {type(value).__name__}, not a tensor")
    if is_traceable_wrapper_subclass(value):
        raise ValueError(
            f"state of {name}: {key} is a {type(value).__name__}, not a plain tensor: gather it first"
        )
    if value.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"state of {name}: {key} has dtype {value.dtype}, expected {expected}")


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
