"""What is spilled when training grows after the decision, and taken back when it has long been smaller."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from adamw_triton.memory import gpu
from adamw_triton.memory.units import format_bytes

Held = Callable[[torch.device], int]
"""Bytes of state and staging on a GPU."""
Spill = Callable[[torch.device, int], int]
"""Takes so many bytes of state off a GPU; how many it were, 0 if there are none left."""
Unspill = Callable[[torch.device, int], int]
"""Takes some of it back, if so many bytes more are enough; how many it were."""

QUIET = 100
"""Steps in which nothing has come to need more memory, before spilled state is taken back. Twice as many
after each time that it then had to go again."""

_log = logging.getLogger("adamw_triton")


class Ours(NamedTuple):
    """Methods of an optimizer, which they do not keep alive."""

    held: weakref.WeakMethod[Held]
    spill: weakref.WeakMethod[Spill]
    unspill: weakref.WeakMethod[Unspill]


class Watch:
    """The memory of one GPU after the decision, and what the optimizer holds of it."""

    def __init__(self, device: torch.device, allocator: gpu.Allocator, ours: Ours) -> None:
        self._device = device
        self._allocator = allocator
        self._ours = ours
        self.owed = self._peak = self._beside = 0
        self._seen: tuple[int, int] | None = None
        self._spilled = self._returned = False
        self._steps, self._quiet = 0, QUIET
        """Since something has come to need more memory; how many it takes."""
        self._retries = self._note().retries
        allocator.on_out_of_memory(self._failed)

    def relieve(self) -> None:
        """Spill what keeps the next peak from fitting, if it is like the highest so far; or take back what
        was spilled, if that has fitted for long."""
        self._steps += 1
        seen, self._seen = self._seen, self._allocator.signs()
        if self._seen != seen or self.owed:
            now = self._note()
            short = self._needs(now) - now.available
            if 2 * short <= now.slack:  # of which the half is left: it is there for such
                short = 0
            if now.retries > self._retries:
                self._retries, self._steps = now.retries, 0
                short = max(short, now.slack)
            short, self.owed = max(short, self.owed), 0
            if short > 0:
                self._make_room(short, "training has come to need more memory")
        if self._spilled and self._steps >= self._quiet:
            self._take_back()

    def _failed(self, allocation: int) -> None:
        self.owed = max(self.owed, allocation + self._note().slack)
        if self._make_room(self.owed, "an allocation failed"):
            self.owed = 0

    def _note(self) -> gpu.Snapshot:
        """Look. If the peak has risen, it was beside what is held now: this is called before that changes."""
        now = self._allocator.snapshot()
        if now.active_peak > self._peak:
            self._peak, self._steps = now.active_peak, 0
            self._beside = max(self._beside, now.active_peak - self._holds())
        return now

    def _holds(self) -> int:
        held = self._ours.held()
        return 0 if held is None else held(self._device)

    def _needs(self, now: gpu.Snapshot) -> int:
        """Bytes that a step takes in all, if its peak is like the highest so far."""
        return self._beside + self._holds() + now.fragmented + now.slack

    def _make_room(self, short: int, why: str) -> int:
        self._steps = 0
        spill = self._ours.spill()
        freed = 0 if spill is None else spill(self._device, short)
        if freed:
            self._quiet *= 1 + self._returned
            self._spilled, self._returned = True, False
            _log.warning(
                "auto: %s (%s): %s of state moved from %s to the host, until there is room for it over %d "
                "steps",
                *(why, format_bytes(short), format_bytes(freed), self._device, self._quiet),
            )
        return freed

    def _take_back(self) -> None:
        self._steps = 0
        unspill = self._ours.unspill()
        now = self._note()
        room = now.available - self._needs(now) - now.slack  # once more, or it would soon have to go again
        if unspill is None or room <= 0:
            return
        try:
            taken = unspill(self._device, room)
        except torch.OutOfMemoryError:  # in pieces too small for it
            taken = self.owed = 0
        self._retries = self._allocator.signs()[1]
        if taken:
            self._returned = True
            _log.warning(
                "auto: there was room over %d steps: %s of state moved from the host to %s",
                *(self._quiet, format_bytes(taken), self._device),
            )
