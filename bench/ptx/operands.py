"""Operands of instructions: registers, constants and special registers, read and written as PTX types.

Registers are arrays of unsigned integers (predicates: of bool) over threads. A value function takes and gives
arrays of the instruction's own types, in which bf16 and fp16 are fp32 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.ptx import floats
from bench.ptx.floats import Array
from bench.ptx.program import (
    Immediate,
    Instruction,
    Operand,
    PtxError,
    Register,
    Sink,
    Special,
    Symbol,
    Unsupported,
)

Read = Callable[[Any], Array]
"""From the threads' context (`emulator.Threads`) to the operand's value."""
Write = Callable[[Any, Array, Array | None], None]
"""(context, value, mask): into the threads of the mask; None: all."""
Step = Callable[[Any, Array | None], None]
"""(context, mask): what an instruction does, for the threads of the mask."""
Decoder = Callable[[Instruction, floats.Approximation], Step]

STORAGE = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_KINDS = {"b": "u", "u": "u", "s": "i"}
_POISON = {1: False, 8: 0xAD, 16: 0xDEAD, 32: 0xDEADBEEF, 64: 0xDEADBEEFDEADBEEF}
"""Of threads that have not written a register that others have, and of undefined parts of a packed one."""


def bits_of(kind: str) -> int:
    if kind == "pred":
        return 1
    return int("".join(filter(str.isdigit, kind)))


def dtype_of(kind: str) -> np.dtype[Any]:
    """As which numpy type values of a PTX type are computed."""
    if kind == "pred":
        return np.dtype(np.bool_)
    if kind in ("f16", "bf16", "f32"):
        return np.dtype(np.float32)
    if kind == "f64":
        return np.dtype(np.float64)
    return np.dtype(f"{_KINDS[kind[0]]}{bits_of(kind) // 8}")


def reader(operand: Operand, kind: str, instruction: Instruction, *, packed: bool = False) -> Read:
    """The operand as the PTX type ``kind``. ``packed``: it becomes a part of a register, of which compilers
    leave parts undefined that nothing reads; these are poison, for what reads them all the same."""
    dtype, bits = dtype_of(kind), bits_of(kind)
    if isinstance(operand, Register):
        index = operand.index
        if operand.bits < bits:
            raise Unsupported(instruction, f"{operand.name} is narrower than {kind} in")
        narrow = STORAGE[bits] if operand.bits > bits else None

        def raw(t: Any) -> Array:
            value = t.registers[index]
            if value is None and packed:
                value = np.full(t.shape, _POISON[operand.bits], dtype=STORAGE[operand.bits])
            if value is None:
                raise PtxError(f"{operand.name} is read before anything was written: {instruction}")
            return value if narrow is None else value.astype(narrow)

        if kind == "bf16":
            return lambda t: floats.from_bf16(raw(t))
        if kind == "f16":
            return lambda t: floats.from_f16(raw(t))
        if dtype == STORAGE[bits]:
            return raw
        return lambda t: raw(t).view(dtype)
    if isinstance(operand, Immediate):
        constant = _constant(operand, kind, instruction)
        return lambda t: constant
    if isinstance(operand, Special):
        name = operand.name
        return lambda t: t.special(name).astype(dtype)
    if isinstance(operand, Symbol):
        symbol = operand.name
        return lambda t: np.array(t.symbol(symbol, instruction), dtype=dtype)
    raise Unsupported(instruction, f"operand {operand} in")


def _constant(immediate: Immediate, kind: str, instruction: Instruction) -> Array:
    dtype, bits = dtype_of(kind), bits_of(kind)
    if immediate.float_bits not in (0, bits):
        raise Unsupported(instruction, "constant of another width in")
    if kind in ("bf16", "f16"):
        raise Unsupported(instruction, "constant of 16-bit float in")
    if immediate.float_bits or kind[0] != "f":
        value = np.array(immediate.value % (1 << bits), dtype=STORAGE[bits])
        return value.view(dtype)
    raise Unsupported(instruction, "integer constant for a float in")


def writer(operand: Operand, kind: str, instruction: Instruction) -> Write:
    """Stores a value of the PTX type ``kind``; into a wider register extended by its sign or by zeros."""
    if isinstance(operand, Sink):
        return lambda t, value, mask: None
    if not isinstance(operand, Register):
        raise Unsupported(instruction, f"result {operand} of")
    index, register_bits, bits = operand.index, operand.bits, bits_of(kind)
    if register_bits < bits:
        raise Unsupported(instruction, f"{operand.name} is narrower than {kind} in")
    storage = STORAGE[register_bits]
    extend: np.dtype[Any] | None = None
    if register_bits > bits:
        if kind in ("f32", "f16", "bf16"):
            raise Unsupported(instruction, f"{operand.name} is wider than {kind} in")
        extend = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{register_bits // 8}")
    poison = _POISON[register_bits]

    def write(t: Any, value: Array, mask: Array | None) -> None:
        if kind == "bf16":
            value = floats.to_bf16(value)
        elif kind == "f16":
            value = floats.to_f16(value)
        if extend is not None:
            value = value.astype(extend)
        value = value.view(storage)
        if value.shape != t.shape:
            value = np.broadcast_to(value, t.shape)
        if mask is not None:
            old = t.registers[index]
            value = np.where(mask, value, storage(poison) if old is None else old)
        t.registers[index] = value

    return write


def step_of(function: Callable[..., Array], reads: Sequence[Read], write: Write) -> Step:
    """A step that computes one value."""
    if len(reads) == 1:
        (a,) = reads
        return lambda t, mask: write(t, function(a(t)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda t, mask: write(t, function(a(t), b(t)), mask)
    return lambda t, mask: write(t, function(*[read(t) for read in reads]), mask)


def apply_to(
    instruction: Instruction, function: Callable[..., Array], kinds: Sequence[str], result: str
) -> Step:
    """d = function(operands of these types)."""
    destination, *sources = instruction.operands
    if len(sources) != len(kinds):
        raise Unsupported(instruction, f"{len(sources)} operands of")
    reads = [reader(source, kind, instruction) for source, kind in zip(sources, kinds, strict=True)]
    return step_of(function, reads, writer(destination, result, instruction))


def modifiers_of(
    instruction: Instruction, allowed: set[str], types: int = 1
) -> tuple[set[str], tuple[str, ...]]:
    """Modifiers between the name and the types; anything else than the allowed is refused."""
    parts = instruction.parts
    modifiers, kinds = set(parts[1 : len(parts) - types]), parts[len(parts) - types :]
    if not modifiers <= allowed:
        raise Unsupported(instruction, f"modifiers {sorted(modifiers - allowed)} of")
    return modifiers, kinds
