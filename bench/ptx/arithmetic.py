"""Arithmetic, of floats and integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.ptx import floats
from bench.ptx.floats import Array
from bench.ptx.operands import Decoder, Step, apply_to, bits_of, dtype_of, modifiers_of
from bench.ptx.program import Instruction, Unsupported


def _float_function(function: Callable[..., Array], modifiers: set[str]) -> Callable[..., Array]:
    """With .ftz (subnormal operands and results become zeros) and .sat."""
    flush, saturate = "ftz" in modifiers, "sat" in modifiers

    def compute(*values: Array) -> Array:
        result = floats.canonical(function(*(map(floats.flushed, values) if flush else values)))
        if flush:
            result = floats.flushed(result)
        if saturate:
            result = np.where(np.isnan(result), np.float32(0), np.clip(result, np.float32(0), np.float32(1)))
        return result

    return compute


def _pairwise(function: Callable[..., Array]) -> Callable[..., Array]:
    """On both fp32 halves of 64 bits."""

    def compute(*values: Array) -> Array:
        shape = np.broadcast_shapes(*(v.shape for v in values))
        halves = [np.ascontiguousarray(np.broadcast_to(v, shape)).view(np.float32) for v in values]
        return np.ascontiguousarray(function(*halves)).view(np.uint64)

    return compute


_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
}


def _arithmetic(instruction: Instruction, approximation: floats.Approximation) -> Step:
    name, kind = instruction.parts[0], instruction.parts[-1]
    function = _ARITHMETIC[name]
    if kind in ("f16", "bf16"):  # of mixed types: f32 = a of 16 bits, b of f32
        if instruction.parts[-2] != "f32":
            raise Unsupported(instruction)
        modifiers, _ = modifiers_of(instruction, {"rn", "sat"}, 2)
        return apply_to(instruction, _float_function(function, modifiers), [kind, "f32"], "f32")
    if kind == "f32x2":
        modifiers, _ = modifiers_of(instruction, {"rn", "ftz"})
        return apply_to(instruction, _pairwise(_float_function(function, modifiers)), ["b64", "b64"], "b64")
    if kind == "f32":
        modifiers, _ = modifiers_of(instruction, {"rn", "ftz", "sat"})
        return apply_to(instruction, _float_function(function, modifiers), [kind, kind], kind)
    if kind == "f64":
        modifiers_of(instruction, {"rn"})
        return apply_to(instruction, function, [kind, kind], kind)
    if name == "mul":
        return _multiply(instruction)
    modifiers_of(instruction, set())
    return apply_to(instruction, function, [kind, kind], kind)


def _multiply(instruction: Instruction) -> Step:
    modifiers, (kind,) = modifiers_of(instruction, {"lo", "hi", "wide"})
    wide = f"{kind[0]}{2 * bits_of(kind)}"
    if modifiers == {"lo"}:
        return apply_to(instruction, np.multiply, [kind, kind], kind)
    if modifiers == {"wide"} or (modifiers == {"hi"} and bits_of(kind) <= 32):
        dtype = dtype_of(wide)
        shift = bits_of(kind) if "hi" in modifiers else 0

        def multiply(a: Array, b: Array) -> Array:
            product = a.astype(dtype) * b.astype(dtype)
            return (product >> dtype.type(shift)).astype(dtype_of(kind)) if shift else product

        return apply_to(instruction, multiply, [kind, kind], kind if shift else wide)
    raise Unsupported(instruction)


def _multiply_add(instruction: Instruction, approximation: floats.Approximation) -> Step:
    kind = instruction.parts[-1]
    if kind[0] == "f":
        return _fma(instruction, approximation)
    modifiers, _ = modifiers_of(instruction, {"lo", "wide"})
    if modifiers == {"lo"}:
        return apply_to(instruction, lambda a, b, c: a * b + c, [kind] * 3, kind)
    wide = f"{kind[0]}{2 * bits_of(kind)}"
    dtype = dtype_of(wide)
    return apply_to(
        instruction, lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c, [kind, kind, wide], wide
    )


def _fma(instruction: Instruction, approximation: floats.Approximation) -> Step:
    narrow = instruction.parts[-1]
    if narrow in ("f16", "bf16") and instruction.parts[-2] == "f32":  # of mixed types: a and b of 16 bits
        modifiers, _ = modifiers_of(instruction, {"rn", "sat"}, 2)
        return apply_to(instruction, _float_function(floats.fma, modifiers), [narrow, narrow, "f32"], "f32")
    modifiers, (kind,) = modifiers_of(instruction, {"rn", "ftz", "sat"})
    if "rn" not in modifiers:
        raise Unsupported(instruction)
    if kind == "f32":
        return apply_to(instruction, _float_function(floats.fma, modifiers), [kind] * 3, kind)
    if kind == "f32x2":
        return apply_to(instruction, _pairwise(_float_function(floats.fma, modifiers)), ["b64"] * 3, "b64")
    raise Unsupported(instruction)


def _divide(instruction: Instruction, approximation: floats.Approximation) -> Step:
    modifiers, (kind,) = modifiers_of(instruction, {"rn", "full", "approx", "ftz"})
    if kind != "f32":
        raise Unsupported(instruction)
    return apply_to(instruction, _float_function(np.divide, modifiers), [kind, kind], kind)


def _special_function(instruction: Instruction, approximation: floats.Approximation) -> Step:
    modifiers, (kind,) = modifiers_of(instruction, {"approx", "rn", "ftz"})
    if kind != "f32":
        raise Unsupported(instruction)
    exact = floats.Approximation() if "rn" in modifiers else approximation
    return apply_to(instruction, exact.function(instruction.parts[0], "ftz" in modifiers), [kind], kind)


def _absolute(instruction: Instruction, approximation: floats.Approximation) -> Step:
    modifiers, (kind,) = modifiers_of(instruction, {"ftz"})
    name = instruction.parts[0]
    if kind == "f32":
        mask = np.uint32(0x7FFFFFFF) if name == "abs" else np.uint32(0x80000000)

        def change(x: Array) -> Array:
            x = floats.flushed(x) if modifiers else x
            bits = x.view(np.uint32)
            return (bits & mask if name == "abs" else bits ^ mask).view(np.float32)

        return apply_to(instruction, change, [kind], kind)
    return apply_to(instruction, np.abs if name == "abs" else np.negative, [kind], kind)


def _extremum(instruction: Instruction, approximation: floats.Approximation) -> Step:
    modifiers, (kind,) = modifiers_of(instruction, {"ftz", "NaN"})
    name = instruction.parts[0]
    if kind == "f32":
        function = floats.maximum if name == "max" else floats.minimum
        if "NaN" in modifiers:
            function = floats.or_nan(function)
        count = len(instruction.operands) - 1
        folded = function if count == 2 else lambda a, b, c: function(function(a, b), c)
        return apply_to(instruction, _float_function(folded, modifiers), [kind] * count, kind)
    if kind[0] in "us":
        return apply_to(instruction, np.maximum if name == "max" else np.minimum, [kind, kind], kind)
    raise Unsupported(instruction)


FAMILIES: dict[str, Decoder] = {
    "add": _arithmetic, "sub": _arithmetic, "mul": _arithmetic, "mad": _multiply_add, "fma": _fma,
    "div": _divide, "rcp": _special_function, "sqrt": _special_function, "rsqrt": _special_function,
    "ex2": _special_function, "lg2": _special_function, "abs": _absolute, "neg": _absolute,
    "min": _extremum, "max": _extremum,
}  # fmt: skip
