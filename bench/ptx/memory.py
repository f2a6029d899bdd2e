"""The memory that a kernel reaches: every access is checked, and races can be recorded."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.ptx.floats import Array
from bench.ptx.records import Races, Traffic, Who

_LOWEST = 1 << 16
"""Nothing of a process lies below. (numpy takes an address of 0 for none.)"""
_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class AccessError(Exception):
    """Outside what was registered, misaligned, or a write to what is only to be read."""


@dataclass(frozen=True)
class Range:
    """Bytes that a kernel may reach."""

    start: int
    nbytes: int
    name: str
    writable: bool = True


def _whole_memory() -> dict[int, Array]:
    """The process's memory as arrays of unsigned integers by their size. Used with checked addresses only."""
    size = (1 << 47) - _LOWEST
    memory = (ctypes.c_uint8 * size).from_address(_LOWEST)
    return {width: np.frombuffer(memory, dtype=kind) for width, kind in _TYPES.items()}


class GlobalMemory:
    """Host memory at its own addresses, as far as it is registered."""

    def __init__(self, ranges: Sequence[Range], races: bool = False, sectors: bool = False) -> None:
        merged: list[Range] = []
        for new in sorted(ranges, key=lambda r: (r.start, r.nbytes)):
            if new.nbytes == 0:
                continue
            last = merged[-1] if merged else None
            if last and new.start < last.start + last.nbytes:  # views of the same memory
                end = max(new.start + new.nbytes, last.start + last.nbytes)
                name = last.name if last.name == new.name else f"{last.name}, {new.name}"
                merged[-1] = Range(last.start, end - last.start, name, last.writable or new.writable)
            else:
                merged.append(new)
        self.ranges = merged
        self._starts = np.array([r.start for r in merged], dtype=np.uint64)
        self._ends = np.array([r.start + r.nbytes for r in merged], dtype=np.uint64)
        self._writable = np.array([r.writable for r in merged], dtype=bool)
        self._memory = _whole_memory()
        sizes = [r.nbytes for r in merged]
        self._places = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.races = Races(int(self._places[-1])) if races else None
        self.traffic = Traffic() if sectors else None

    def _check(self, addresses: Array, width: int, who: Who, *, store: bool) -> Array:
        """The range of each address."""
        at = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        inside = (at >= 0) & (addresses + np.uint64(width) <= self._ends[at])
        aligned = addresses % np.uint64(width) == 0
        good = inside & aligned
        if store:
            good &= self._writable[at]
        if not good.all():
            self._refuse(addresses, at, width, inside, aligned, who, store)
        if self.traffic:
            self.traffic.record(addresses, width, who)
        return at

    def _refuse(
        self, addresses: Array, at: Array, width: int, inside: Array, aligned: Array, who: Who, store: bool
    ) -> None:
        bad = ~(inside & aligned)
        first = int(np.flatnonzero(bad)[0]) if bad.any() else int(np.flatnonzero(~self._writable[at])[0])
        address, nearest = int(addresses[first]), self.ranges[max(int(at[first]), 0)]
        if not inside[first]:
            distance = address - nearest.start
            what = f"outside: {distance} bytes from the begin of {nearest.name}, of {nearest.nbytes} bytes"
        elif not aligned[first]:
            what = f"misaligned, in {nearest.name} at byte {address - nearest.start}"
        else:
            what = f"{nearest.name} is read only"
        count = int(bad.sum())
        kind = "store" if store else "load"
        raise AccessError(
            f"{kind} of {width} bytes at {address:#x}: {what}; {who.describe(first)}; {count} threads"
        )

    def load(self, addresses: Array, size: int, count: int, who: Who) -> list[Array]:
        """``count`` numbers of ``size`` bytes each from every address."""
        at = self._check(addresses, size * count, who, store=False)
        if self.races:
            self.races.record(self._bytes(addresses, at, size * count), who, size * count, store=False)
        first = ((addresses - np.uint64(_LOWEST)) // np.uint64(size)).astype(np.int64)
        return [self._memory[size][first + item] for item in range(count)]

    def store(self, addresses: Array, size: int, values: Sequence[Array], who: Who) -> None:
        at = self._check(addresses, size * len(values), who, store=True)
        if self.races:
            whole = np.stack([np.ascontiguousarray(v).view(np.uint8).reshape(-1, size) for v in values], 1)
            self.races.record(
                self._bytes(addresses, at, size * len(values)),
                who,
                size * len(values),
                store=True,
                values=whole,
            )
        first = ((addresses - np.uint64(_LOWEST)) // np.uint64(size)).astype(np.int64)
        for item, value in enumerate(values):
            self._memory[size][first + item] = value

    def _bytes(self, addresses: Array, at: Array, width: int) -> Array:
        """Where the accessed bytes stand in the records: [accesses, width]."""
        place = self._places[at] + (addresses - self._starts[at]).astype(np.int64)
        return place[:, None] + np.arange(width)

    def describe(self, place: int) -> str:
        at = int(np.searchsorted(self._places, place, side="right")) - 1
        return f"{self.ranges[at].name} byte {place - int(self._places[at])}"


class SharedMemory:
    """Of all CTAs that run together: one row each."""

    BASE = 1024
    """Address of the first byte: not 0, so that a forgotten base is found."""

    def __init__(self, ctas: int, nbytes: int, races: bool = False) -> None:
        self.nbytes = nbytes
        self._rows = np.full((ctas, -(-nbytes // 16) * 16), 0xA5, dtype=np.uint8)
        self._written = np.zeros(self._rows.shape, dtype=bool) if races else None
        self.races = Races(self._rows.size) if races else None
        self.unwritten: Counter[str] = Counter()
        """Instructions that read what nobody had written."""

    def _places(self, addresses: Array, width: int, row: Array, who: Who) -> Array:
        offset = addresses.astype(np.int64) - self.BASE
        good = (offset >= 0) & (offset + width <= self.nbytes) & (offset % width == 0)
        if not good.all():
            first = int(np.flatnonzero(~good)[0])
            raise AccessError(
                f"shared memory, {width} bytes at offset {int(offset[first])} of {self.nbytes}: outside or "
                f"misaligned; {who.describe(first)}"
            )
        return row.astype(np.int64) * self._rows.shape[1] + offset

    def load(self, addresses: Array, size: int, count: int, row: Array, who: Who) -> list[Array]:
        places = self._places(addresses, size * count, row, who)
        if self.races is not None and self._written is not None:
            every = places[:, None] + np.arange(size * count)
            if not self._written.reshape(-1)[every].all():
                self.unwritten[who.instruction] += 1
            self.races.record(every, who, size * count, store=False)
        flat = self._rows.reshape(-1).view(_TYPES[size])
        return [flat[places // size + item] for item in range(count)]

    def store(self, addresses: Array, size: int, values: Sequence[Array], row: Array, who: Who) -> None:
        places = self._places(addresses, size * len(values), row, who)
        if self.races is not None and self._written is not None:
            every = places[:, None] + np.arange(size * len(values))
            whole = np.stack([np.ascontiguousarray(v).view(np.uint8).reshape(-1, size) for v in values], 1)
            self._written.reshape(-1)[every] = True
            self.races.record(every, who, size * len(values), store=True, values=whole)
        flat = self._rows.reshape(-1).view(_TYPES[size])
        for item, value in enumerate(values):
            flat[places // size + item] = value
