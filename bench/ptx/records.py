"""What is noted of accesses to memory: races, and the sectors that they move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from bench.ptx.floats import Array


@dataclass(frozen=True)
class Who:
    """Threads that access memory at the same time."""

    thread: Array
    """Numbered through the grid."""
    cta: Array
    epoch: Array
    """Of the CTA: how many barriers it has passed."""
    instruction: str

    def describe(self, at: int) -> str:
        return f"{self.instruction}: thread {int(self.thread[at])} of the grid, CTA {int(self.cta[at])}"


@dataclass
class Traffic:
    """What each instruction's accesses cost: a warp's access moves whole sectors of 32 bytes."""

    requests: Counter[str] = field(default_factory=Counter)
    """Warps that executed it."""
    sectors: Counter[str] = field(default_factory=Counter)
    wanted: Counter[str] = field(default_factory=Counter)
    """Different bytes."""

    def record(self, addresses: Array, width: int, who: Who) -> None:
        warps = who.thread // 32
        every = addresses.astype(np.int64)[:, None] + np.arange(width)
        of_warp = np.repeat(warps, width).reshape(every.shape) << 48
        self.requests[who.instruction] += len(np.unique(warps))
        self.sectors[who.instruction] += len(np.unique(of_warp + every // 32))
        self.wanted[who.instruction] += len(np.unique(of_warp + every))


@dataclass
class Races:
    """Who last wrote and read each byte; conflicts between CTAs, and between threads of a CTA that no barrier
    separates."""

    size: int
    conflicts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    _NONE = np.int64(-1)
    _MOST = np.int64(1 << 62)

    def __post_init__(self) -> None:
        full = lambda value: np.full(self.size, value, dtype=np.int64)  # noqa: E731
        self._writer, self._write_cta, self._write_epoch = full(-1), full(-1), full(-1)
        self._read_cta_low, self._read_cta_high = full(self._MOST), full(-1)
        self._reader_low, self._reader_high, self._read_epoch = full(self._MOST), full(-1), full(-1)

    def record(self, every: Array, who: Who, width: int, *, store: bool, values: Array | None = None) -> None:
        """``every``: places of bytes, [accesses, width]."""
        places = every.reshape(-1)
        thread, cta, epoch = (np.repeat(each, width) for each in (who.thread, who.cta, who.epoch))
        wrote = self._write_cta[places]
        self._note(
            "between CTAs: written by another", (wrote >= 0) & (wrote != cta), places, who, width, store
        )
        same = (wrote == cta) & (self._write_epoch[places] == epoch) & (self._writer[places] != thread)
        self._note("in a CTA: written by another thread, no barrier between", same, places, who, width, store)
        if store:
            others = (self._read_cta_low[places] < cta) | (self._read_cta_high[places] > cta)
            self._note("between CTAs: read by another", others, places, who, width, store)
            alone = (self._reader_low[places] >= thread) & (self._reader_high[places] <= thread)
            unsafe = (self._read_epoch[places] == epoch) & (self._read_cta_high[places] == cta) & ~alone
            self._note(
                "in a CTA: read by another thread, no barrier between", unsafe, places, who, width, store
            )
            self._note_together(places, thread, values, who, width)
            self._writer[places], self._write_cta[places], self._write_epoch[places] = thread, cta, epoch
            return
        np.minimum.at(self._read_cta_low, places, cta)
        np.maximum.at(self._read_cta_high, places, cta)
        old = self._read_epoch[places] != epoch
        self._reader_low[places[old]], self._reader_high[places[old]] = self._MOST, self._NONE
        self._read_epoch[places] = epoch
        np.minimum.at(self._reader_low, places, thread)
        np.maximum.at(self._reader_high, places, thread)

    def _note_together(
        self, places: Array, thread: Array, values: Array | None, who: Who, width: int
    ) -> None:
        """One instruction that writes a byte from several threads."""
        order = np.argsort(places, kind="stable")
        again = np.zeros(len(places), dtype=bool)
        repeated = (places[order][1:] == places[order][:-1]) & (thread[order][1:] != thread[order][:-1])
        again[order[1:]] = repeated
        if values is None or not again.any():
            return
        written = values.reshape(-1)
        differ = np.zeros(len(places), dtype=bool)
        differ[order[1:]] = repeated & (written[order][1:] != written[order][:-1])
        self._note("one store, several threads, different values", differ, places, who, width, True)
        self._note(
            "one store, several threads, the same value (harmless)", again & ~differ, places, who, width, True
        )

    def _note(self, kind: str, bad: Array, places: Array, who: Who, width: int, store: bool) -> None:
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            self.conflicts[kind] += int(bad.sum())
            verb = "store" if store else "load"
            self.examples.setdefault(
                kind, f"{verb} at place {int(places[first])}, {who.describe(first // width)}"
            )
