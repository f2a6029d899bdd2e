"""Steps by which the threads of a warp reach each other: shuffles and reductions.

Their context ``t`` is `emulator.Threads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.ptx import floats
from bench.ptx.floats import Array
from bench.ptx.operands import Decoder, Step, reader, writer
from bench.ptx.program import Instruction, PtxError, Unsupported

WARP = 32


def require_whole_warps(instruction: Instruction, t: Any, mask: Array | None) -> None:
    if mask is not None:
        warps = mask.reshape(-1, WARP)
        if (warps.any(axis=1) != warps.all(axis=1)).any():
            raise PtxError(f"only a part of a warp is at {instruction}")


def _require_members(instruction: Instruction, members: Array, mask: Array | None, t: Any) -> None:
    """All threads that the member mask names are here."""
    active = np.ones(t.shape, dtype=bool) if mask is None else mask
    lanes = active.reshape(-1, WARP)
    bits = (lanes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    wanted = np.broadcast_to(members, t.shape).reshape(-1, WARP)
    here = lanes.any(axis=1)
    named = wanted[:, 0].astype(np.uint64)
    if (wanted != wanted[:, :1])[lanes].any() or (named != bits)[here].any():
        raise PtxError(f"not exactly the threads of the member mask are at {instruction}")


def _shuffle(instruction: Instruction, approximation: floats.Approximation) -> Step:
    parts = instruction.parts
    if (
        len(parts) != 4
        or parts[1] != "sync"
        or parts[3] != "b32"
        or parts[2] not in ("bfly", "up", "down", "idx")
    ):
        raise Unsupported(instruction)
    mode = parts[2]
    destination, source, amount, clamp, members = instruction.operands
    value, by, limits = (reader(o, "b32", instruction) for o in (source, amount, clamp))
    named = reader(members, "u32", instruction)
    write = writer(destination, "b32", instruction)  # d|p is not modelled

    def exchange(t: Any, mask: Array | None) -> None:
        _require_members(instruction, named(t), mask, t)
        lane = t.lane % np.uint32(WARP)
        b, c = by(t) & np.uint32(31), limits(t)
        segment, bound = (c >> np.uint32(8)) & np.uint32(31), c & np.uint32(31)
        highest = (lane & segment) | (bound & ~segment & np.uint32(31))
        if mode == "bfly":
            other, valid = lane ^ b, (lane ^ b) <= highest
        elif mode == "up":
            other, valid = lane - b, lane.astype(np.int64) - b >= highest
        elif mode == "down":
            other, valid = lane + b, lane + b <= highest
        else:
            other = (lane & segment) | (b & ~segment & np.uint32(31))
            valid = other <= highest
        other = np.where(valid, other, lane).astype(np.int64)
        values = np.broadcast_to(value(t), t.shape).reshape(-1, WARP)
        write(t, np.take_along_axis(values, other.reshape(-1, WARP), axis=1).reshape(-1), mask)

    return exchange


def _reduce(instruction: Instruction, approximation: floats.Approximation) -> Step:
    """redux.sync of all threads of a warp."""
    parts = instruction.parts
    kind, modifiers = parts[-1], set(parts[2:-1])
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "max": np.maximum, "min": np.minimum,
    }  # fmt: skip
    if parts[1] != "sync" or modifiers - {*functions, "abs", "NaN"}:
        raise Unsupported(instruction)
    (name,) = modifiers & set(functions)
    function = functions[name]
    if kind == "f32":
        function = floats.maximum if name == "max" else floats.minimum
        if "NaN" in modifiers:
            function = floats.or_nan(function)
    value, named = (
        reader(instruction.operands[1], kind, instruction),
        reader(instruction.operands[2], "u32", instruction),
    )
    write = writer(instruction.operands[0], kind, instruction)

    def fold(t: Any, mask: Array | None) -> None:
        members = np.broadcast_to(named(t), t.shape)
        if (members[slice(None) if mask is None else mask] != 0xFFFFFFFF).any():
            raise Unsupported(instruction, "member mask of a part of a warp in")
        _require_members(instruction, members, mask, t)
        lanes = np.broadcast_to(value(t), t.shape).reshape(-1, WARP)
        lanes = np.abs(lanes) if "abs" in modifiers else lanes
        result = np.ascontiguousarray(lanes[:, 0])
        for at in range(1, WARP):
            result = function(result, np.ascontiguousarray(lanes[:, at]))
        write(t, np.repeat(floats.canonical(result) if kind == "f32" else result, WARP), mask)

    return fold


def _nothing(instruction: Instruction, approximation: floats.Approximation) -> Step:
    """What orders accesses: here each is done before the next begins."""
    if instruction.opcode not in _ORDERING:
        raise Unsupported(instruction)
    return lambda t, mask: None


_ORDERING = {"bar.warp.sync", "membar.gl", "membar.cta", "fence.acq_rel.gpu", "fence.acq_rel.cta"}
FAMILIES: dict[str, Decoder] = {
    "shfl": _shuffle, "redux": _reduce, "bar": _nothing, "membar": _nothing, "fence": _nothing,
}  # fmt: skip
