"""Steps by which threads reach memory: loads, stores, matrices of shared memory.

Their context ``t`` is `emulator.Threads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.ptx import floats
from bench.ptx.floats import Array
from bench.ptx.operands import STORAGE, Decoder, Read, Step, Write, bits_of, reader, writer
from bench.ptx.program import Address, Instruction, Register, Symbol, Unsupported, Vector
from bench.ptx.warps import WARP, require_whole_warps

_CACHE_QUALIFIERS = {
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "relaxed", "weak", "volatile", "gpu", "cta", "sys",
    "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L1::evict_normal", "L1::evict_unchanged",
    "L2::64B", "L2::128B", "L2::256B",
}  # fmt: skip
"""Hints, which change no value here."""


def _access(instruction: Instruction, approximation: floats.Approximation) -> Step:
    parts = instruction.parts
    kind, space = parts[-1], parts[1]
    middle = set(parts[2:-1])
    count = next((int(name[1:]) for name in middle if name in ("v2", "v4", "v8")), 1)
    if middle - _CACHE_QUALIFIERS - {f"v{count}"} or space not in ("global", "shared", "param"):
        raise Unsupported(instruction)
    first, second = instruction.operands
    values, address = (second, first) if parts[0] == "st" else (first, second)
    if not isinstance(address, Address):
        raise Unsupported(instruction)
    items = values.items if isinstance(values, Vector) else (values,)
    if len(items) != count:
        raise Unsupported(instruction, "vector of another length in")
    size = bits_of(kind) // 8
    if space == "param":
        if instruction.parts[0] != "ld" or len(items) != 1:
            raise Unsupported(instruction)
        return _load_parameter(instruction, address, kind, writer(items[0], kind, instruction))
    addresses = _address_reader(instruction, address, space)
    raw = STORAGE[8 * size]
    if parts[0] == "ld":
        writes = [writer(item, kind, instruction) for item in items]
        return _load(instruction, space, addresses, size, writes, kind)
    reads = [reader(item, f"b{8 * size}", instruction) for item in items]
    return _store(instruction, space, addresses, size, [lambda t, r=r: r(t).astype(raw) for r in reads])


def _address_reader(instruction: Instruction, address: Address, space: str) -> Read:
    """Of all threads, u64 or of shared memory u32."""
    wide = isinstance(address.base, Register) and address.base.bits == 64
    kind = "u64" if space == "global" or wide else "u32"
    base = reader(address.base, kind, instruction)
    dtype = np.uint64 if kind == "u64" else np.uint32
    offset = dtype(address.offset % (1 << (64 if kind == "u64" else 32)))

    def read(t: Any) -> Array:
        value = base(t) + offset
        return value if value.shape == t.shape else np.broadcast_to(value, t.shape)

    return read


def _load_parameter(instruction: Instruction, address: Address, kind: str, write: Write) -> Step:
    if not isinstance(address.base, Symbol):
        raise Unsupported(instruction)
    name = address.base.name

    def load(t: Any, mask: Array | None) -> None:
        parameter = next(p for p in t.program.parameters if p.name == name)
        begin = parameter.offset + address.offset
        value = np.frombuffer(t.parameters, dtype=STORAGE[bits_of(kind)], count=1, offset=begin)[0]
        write(t, np.full(t.shape, value), mask)

    return load


def _load(
    instruction: Instruction, space: str, addresses: Read, size: int, writes: Sequence[Write], kind: str
) -> Step:
    signed = np.dtype(f"i{size}") if kind[0] == "s" else None

    def load(t: Any, mask: Array | None) -> None:
        at = None if mask is None else np.flatnonzero(mask)
        where = addresses(t) if at is None else addresses(t)[at]
        who = t.who(at, instruction)
        if space == "global":
            loaded = t.memory.load(where, size, len(writes), who)
        else:
            loaded = t.shared.load(where, size, len(writes), t.row if at is None else t.row[at], who)
        for write, value in zip(writes, loaded, strict=True):
            if at is not None:
                whole = np.zeros(t.shape, dtype=value.dtype)
                whole[at] = value
                value = whole
            write(t, value if signed is None else value.view(signed), mask)

    return load


def _store(instruction: Instruction, space: str, addresses: Read, size: int, reads: Sequence[Read]) -> Step:
    def store(t: Any, mask: Array | None) -> None:
        at = None if mask is None else np.flatnonzero(mask)
        where = addresses(t) if at is None else addresses(t)[at]
        whole = [np.broadcast_to(read(t), t.shape) for read in reads]
        values = whole if at is None else [value[at] for value in whole]
        who = t.who(at, instruction)
        if space == "global":
            t.memory.store(where, size, values, who)
        else:
            t.shared.store(where, size, values, t.row if at is None else t.row[at], who)

    return store


def _matrix(instruction: Instruction, approximation: floats.Approximation) -> Step:
    """Thread 8*i + r of a warp names row r of matrix i, 8 numbers of 16 bits; each thread has two of every
    matrix: of row lane/4 the columns 2*(lane%4) and the next, or with .trans of these rows the column
    lane/4."""
    if instruction.parts[1:4] != ("sync", "aligned", "m8n8") or instruction.parts[-2:] != ("shared", "b16"):
        raise Unsupported(instruction)
    transposed = "trans" in instruction.parts
    first, second = instruction.operands
    storing = instruction.parts[0] == "stmatrix"
    vector, address = (second, first) if storing else (first, second)
    if not isinstance(vector, Vector) or not isinstance(address, Address):
        raise Unsupported(instruction)
    addresses = _address_reader(instruction, address, "shared")
    reads = [reader(item, "b32", instruction) for item in vector.items] if storing else []
    writes = [] if storing else [writer(item, "b32", instruction) for item in vector.items]
    matrices = len(vector.items)

    def move(t: Any, mask: Array | None) -> None:
        require_whole_warps(instruction, t, mask)
        rows = addresses(t).reshape(-1, WARP)
        lane = np.arange(WARP, dtype=np.uint32)
        who = t.who(None if mask is None else np.flatnonzero(mask), instruction)
        place = slice(None) if mask is None else mask
        for number in range(matrices):
            halves = []
            value = np.broadcast_to(reads[number](t), t.shape) if storing else None
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                if transposed:
                    row, column = column, row
                where = (rows[:, 8 * number + row] + 2 * column).reshape(-1)[place]
                if value is None:
                    halves += t.shared.load(where, 2, 1, t.row[place], who)
                else:
                    part = (value >> np.uint32(16 * half)).astype(np.uint16)
                    t.shared.store(where, 2, [part[place]], t.row[place], who)
            if value is None:
                whole = np.zeros(t.shape, dtype=np.uint32)
                whole[place] = halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16))
                writes[number](t, whole, mask)

    return move


FAMILIES: dict[str, Decoder] = {"ld": _access, "st": _access, "ldmatrix": _matrix, "stmatrix": _matrix}
