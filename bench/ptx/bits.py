"""Bits, choices, comparisons and moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.ptx import floats
from bench.ptx.floats import Array
from bench.ptx.operands import (
    STORAGE,
    Decoder,
    Step,
    apply_to,
    bits_of,
    dtype_of,
    modifiers_of,
    reader,
    step_of,
    writer,
)
from bench.ptx.program import Instruction, Pair, Unsupported, Vector

_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


def _logic(instruction: Instruction, approximation: floats.Approximation) -> Step:
    _, (kind,) = modifiers_of(instruction, set())
    name = instruction.parts[0]
    return apply_to(instruction, _LOGIC[name], [kind] * (1 if name == "not" else 2), kind)


def _shift(instruction: Instruction, approximation: floats.Approximation) -> Step:
    """Amounts above the width count as the width."""
    _, (kind,) = modifiers_of(instruction, set())
    name, bits = instruction.parts[0], bits_of(kind)
    dtype = dtype_of(kind)

    def shift(value: Array, amount: Array) -> Array:
        within = np.minimum(amount, np.uint32(bits - 1)).astype(dtype)
        moved = value << within if name == "shl" else value >> within
        if kind[0] == "s" and name == "shr":
            return moved
        return np.where(amount >= bits, dtype.type(0), moved)

    return apply_to(instruction, shift, [kind, "u32"], kind)


def _funnel_shift(instruction: Instruction, approximation: floats.Approximation) -> Step:
    modifiers, (kind,) = modifiers_of(instruction, {"l", "r", "wrap", "clamp"})

    def shift(low: Array, high: Array, amount: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        by = (amount & np.uint32(31) if "wrap" in modifiers else np.minimum(amount, np.uint32(32))).astype(
            np.uint64
        )
        if "l" in modifiers:
            return ((both << by) >> np.uint64(32)).astype(np.uint32)
        return (both >> by).astype(np.uint32)

    return apply_to(instruction, shift, [kind, kind, "u32"], kind)


def _field_extract(instruction: Instruction, approximation: floats.Approximation) -> Step:
    _, (kind,) = modifiers_of(instruction, set())
    if bits_of(kind) != 32:
        raise Unsupported(instruction)

    def extract(value: Array, position: Array, length: Array) -> Array:
        position, length = (
            (position & np.uint32(255)).astype(np.int64),
            (length & np.uint32(255)).astype(np.int64),
        )
        wide = value.astype(np.int64)  # sign or zeros above, as the type wants
        moved = wide >> np.minimum(position, 62)
        kept = moved & ((np.int64(1) << np.minimum(length, 62)) - 1)
        if kind[0] == "u":
            return kept.astype(np.uint32)
        sign = (wide >> np.clip(position + length - 1, 0, 31)) & 1
        extended = np.where((sign == 1) & (length > 0), kept | -(np.int64(1) << np.minimum(length, 62)), kept)
        return extended.astype(np.int32)

    return apply_to(instruction, extract, [kind, "u32", "u32"], kind)


def _count_bits(instruction: Instruction, approximation: floats.Approximation) -> Step:
    _, (kind,) = modifiers_of(instruction, set())
    return apply_to(instruction, _ones_in, [f"u{bits_of(kind)}"], "u32")


def _ones_in(value: Array) -> Array:
    """Of each number, how many bits are set: in pairs, in fours, in bytes, and of these the sum."""
    x = value.astype(np.uint64)
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint32)


def _permute(instruction: Instruction, approximation: floats.Approximation) -> Step:
    """Each nibble of the selector picks a byte of {b, a}; its high bit takes that byte's sign instead."""
    modifiers_of(instruction, set())

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), dtype=np.uint32)
        for at in range(4):
            nibble = (selector >> np.uint32(4 * at)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(0xFF)
            signs = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            chosen = np.where(nibble & np.uint32(8), signs, byte)
            result = result | (chosen.astype(np.uint32) << np.uint32(8 * at))
        return result

    return apply_to(instruction, permute, ["b32"] * 3, "b32")


def _logic3(instruction: Instruction, approximation: floats.Approximation) -> Step:
    modifiers_of(instruction, set())

    def combine(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a)
        for row in range(8):
            if int(table) >> row & 1:
                result = result | (
                    (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                )  # fmt: skip
        return result

    return apply_to(instruction, combine, ["b32", "b32", "b32", "u32"], "b32")


def _select(instruction: Instruction, approximation: floats.Approximation) -> Step:
    _, (kind,) = modifiers_of(instruction, set())
    raw = f"b{bits_of(kind)}"
    return apply_to(instruction, lambda a, b, p: np.where(p, a, b), [raw, raw, "pred"], raw)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_INTEGER_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _compare(instruction: Instruction, approximation: floats.Approximation) -> Step:
    """Of floats, eq ... ge are false with NaN, equ ... geu are true; num and nan ask for NaN alone. Of two in
    a register, the low ones give the first predicate."""
    parts, destination = instruction.parts, instruction.operands[0]
    name, kind = parts[1], parts[-1].removesuffix("x2")
    two = parts[-1] in ("f16x2", "bf16x2")
    if set(parts[2:-1]) - (set() if two else {"ftz"}) or isinstance(destination, Pair) != two:
        raise Unsupported(instruction)
    floating = kind[0] == "f" or kind == "bf16"
    if floating and name in ("num", "nan"):
        compare = lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")  # noqa: E731
    elif floating and name.endswith("u") and name[:-1] in _COMPARISONS:
        ordered = _COMPARISONS[name[:-1]]
        compare = lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
    elif (name if floating else _INTEGER_NAMES.get(name, name)) in _COMPARISONS:
        compare = _COMPARISONS[name if floating else _INTEGER_NAMES.get(name, name)]
    else:
        raise Unsupported(instruction)
    if "ftz" in parts:
        strict = compare
        compare = lambda a, b: strict(floats.flushed(a), floats.flushed(b))  # noqa: E731
    if isinstance(destination, Pair):
        widen = floats.from_f16 if kind == "f16" else floats.from_bf16
        return _compare_two(instruction, destination, compare, widen)
    return apply_to(instruction, compare, [kind, kind], "pred")


def _compare_two(
    instruction: Instruction,
    pair: Pair,
    compare: Callable[[Array, Array], Array],
    widen: Callable[[Array], Array],
) -> Step:
    reads = [reader(source, "b32", instruction) for source in instruction.operands[1:]]
    writes = [writer(item, "pred", instruction) for item in (pair.first, pair.second)]

    def step(t: Any, mask: Array | None) -> None:
        words = [read(t) for read in reads]
        for at, write in enumerate(writes):
            a, b = (widen((word >> np.uint32(16 * at)).astype(np.uint16)) for word in words)
            write(t, compare(a, b), mask)

    return step


def _move(instruction: Instruction, approximation: floats.Approximation) -> Step:
    """Also packs a vector into a register, and unpacks."""
    _, (kind,) = modifiers_of(instruction, set())
    destination, source = instruction.operands
    if isinstance(source, Vector):
        part = bits_of(kind) // len(source.items)
        reads = [reader(item, f"b{part}", instruction, packed=True) for item in source.items]
        wide = STORAGE[bits_of(kind)]

        def pack(*values: Array) -> Array:
            return sum(
                (value.astype(wide) << wide(part * at) for at, value in enumerate(values)), start=wide(0)
            )

        return step_of(pack, reads, writer(destination, f"b{bits_of(kind)}", instruction))
    if isinstance(destination, Vector):
        part = bits_of(kind) // len(destination.items)
        read = reader(source, f"b{bits_of(kind)}", instruction)
        writes = [writer(item, f"b{part}", instruction) for item in destination.items]
        wide, narrow = STORAGE[bits_of(kind)], STORAGE[part]

        def unpack(t: Any, mask: Array | None) -> None:
            value = read(t)
            for at, write in enumerate(writes):
                write(t, (value >> wide(part * at)).astype(narrow), mask)

        return unpack
    raw = "pred" if kind == "pred" else f"b{bits_of(kind)}"
    return apply_to(instruction, lambda x: x, [raw], raw)


def _to_global(instruction: Instruction, approximation: floats.Approximation) -> Step:
    """Generic and global addresses are the same."""
    if instruction.opcode not in ("cvta.to.global.u64", "cvta.global.u64"):
        raise Unsupported(instruction)
    return apply_to(instruction, lambda x: x, ["u64"], "u64")


FAMILIES: dict[str, Decoder] = {
    "and": _logic, "or": _logic, "xor": _logic, "not": _logic, "shl": _shift, "shr": _shift,
    "shf": _funnel_shift, "bfe": _field_extract, "popc": _count_bits, "prmt": _permute, "lop3": _logic3,
    "selp": _select, "setp": _compare, "mov": _move, "cvta": _to_global,
}  # fmt: skip
