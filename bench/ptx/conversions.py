"""cvt: between integers, floats and both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.ptx import floats
from bench.ptx.floats import Array
from bench.ptx.operands import Decoder, Step, apply_to, bits_of, dtype_of
from bench.ptx.program import Instruction, PtxError, Unsupported

_INTEGRAL: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


def _convert(instruction: Instruction, approximation: floats.Approximation) -> Step:
    parts = instruction.parts
    to, of = parts[-2], parts[-1]
    modifiers = set(parts[1:-2])
    if modifiers - {"rn", "ftz", "sat", *_INTEGRAL}:
        raise Unsupported(instruction)
    flush, saturate = "ftz" in modifiers, "sat" in modifiers
    integral = next((_INTEGRAL[name] for name in modifiers if name in _INTEGRAL), None)
    if to in ("bf16x2", "f16x2"):
        return _convert_two(instruction, to.removesuffix("x2"), modifiers)
    to_float, of_float = to[0] in "fb", of[0] in "fb"
    if not to_float and not of_float:
        return apply_to(instruction, _between_integers(to, of, saturate), [of], to)
    if to_float and not of_float:
        if "rn" not in modifiers or to not in ("f32", "f64"):
            raise Unsupported(instruction)
        return apply_to(instruction, lambda x: x.astype(dtype_of(to)), [of], to)
    if not to_float:
        if integral is None:
            raise Unsupported(instruction)
        return apply_to(instruction, _to_integer(to, integral, flush), [of], to)
    narrowing = bits_of(to) < bits_of(of)
    if narrowing != ("rn" in modifiers) or (bits_of(to) == bits_of(of) and (to != of or integral is None)):
        raise Unsupported(instruction)

    def convert(x: Array) -> Array:
        if flush:
            x = floats.flushed(x)
        if integral is not None:
            x = floats.canonical(integral(x))
        x = x.astype(dtype_of(to))
        return np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype) if saturate else x

    return apply_to(instruction, convert, [of], to)


def _convert_two(instruction: Instruction, to: str, modifiers: set[str]) -> Step:
    """d = {a in the high half, b in the low one}"""
    if modifiers != {"rn"}:
        raise Unsupported(instruction)
    narrow = floats.to_bf16 if to == "bf16" else floats.to_f16

    def convert(high: Array, low: Array) -> Array:
        return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low).astype(np.uint32)

    return apply_to(instruction, convert, ["f32", "f32"], "b32")


def _between_integers(to: str, of: str, saturate: bool) -> Callable[[Array], Array]:
    if not saturate:
        return lambda x: x.astype(dtype_of(to))
    limits = np.iinfo(dtype_of(to))

    def convert(x: Array) -> Array:
        low = max(int(limits.min), int(np.iinfo(x.dtype).min))
        high = min(int(limits.max), int(np.iinfo(x.dtype).max))
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype_of(to))

    return convert


def _to_integer(to: str, integral: Callable[[Array], Array], flush: bool) -> Callable[[Array], Array]:
    """Out of range: the nearest integer; NaN: 0."""
    dtype = dtype_of(to)
    limits = np.iinfo(dtype)
    if dtype.itemsize == 8:
        raise PtxError("conversions from floats to 64-bit integers are not modelled")

    def convert(x: Array) -> Array:
        x = integral((floats.flushed(x) if flush else x).astype(np.float64))
        return np.where(np.isnan(x), 0, np.clip(x, limits.min, limits.max)).astype(dtype)

    return convert


FAMILIES: dict[str, Decoder] = {"cvt": _convert}
