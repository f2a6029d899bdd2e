"""How paged state reaches the kernels: by the copy engines, or read and written where it lies.

Which is faster depends on the card, so the first steps try both. They do their work meanwhile: the bits
of a step are the same either way.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

from adamw_triton.paging.device import Device, Event

COPY, ZERO_COPY = "copy", "zero_copy"

# Twice each: the first time compiles kernels and makes tables.
_TRIALS = (COPY, COPY, ZERO_COPY, ZERO_COPY)

_log = logging.getLogger("adamw_triton")


class _Run(NamedTuple):
    transfer: str
    nbytes: int
    begin: Event
    end: Event


class Choice:
    """The way of one device: what the user named, or under "auto" the faster one."""

    def __init__(self, device: Device, transfer: str) -> None:
        self._device = device
        self._named = transfer
        self._trials = deque(_TRIALS if transfer == "auto" else ())
        self._last: _Run | None = None
        self._rates: dict[str, float] = {}
        self._way = COPY if transfer == "auto" else transfer

    @property
    def settled(self) -> bool:
        return not self._trials

    def next(self, reachable: bool) -> str:
        """The way of the step that begins now; ``reachable``: whether kernels can reach the state."""
        self._note()
        if not reachable:
            if self._way == ZERO_COPY:
                _log.warning("the GPU cannot reach this host memory itself: transfer='copy' is used")
            self._trials.clear()
            self._way = COPY
        return self._trials[0] if self._trials else self._way

    def ran(self, transfer: str, nbytes: int, begin: Event, end: Event) -> None:
        """Tell of a step that was queued: ``begin`` on the compute stream, ``end`` of the last page."""
        if self._trials:
            self._trials.popleft()
            self._last = _Run(transfer, nbytes, begin, end)

    def _note(self) -> None:
        if self._last is None:
            return
        run, self._last = self._last, None
        seconds = self._device.seconds(run.begin, run.end)  # it ended long ago
        self._rates[run.transfer] = run.nbytes / max(seconds, 1e-9)
        if not self._trials:
            self._way = max(self._rates, key=lambda transfer: self._rates[transfer])
            found = ", ".join(f"{transfer} {rate / 1e9:.1f} GB/s" for transfer, rate in self._rates.items())
            _log.info("paged state: %s each way; %s is used", found, self._way)
