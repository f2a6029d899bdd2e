"""Ctrl-C waits until something is whole."""

from __future__ import annotations

# What `signal` wraps in enums: three times in each step that would take 20 us.
import _signal  # type: ignore[import-not-found]
import threading
from signal import SIGINT
from types import FrameType, TracebackType
from typing import Any


class DeferredInterrupt:
    """A context in which SIGINT waits until the end. Only the main thread of a process gets signals;
    elsewhere, and where a handler was not set from Python, this does nothing."""

    def __enter__(self) -> None:
        self._caught: tuple[int, FrameType | None] | None = None
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            previous = _signal.getsignal(SIGINT)
            if callable(previous):
                self._previous = previous
                _signal.signal(SIGINT, self._catch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is None:
            return
        _signal.signal(SIGINT, self._previous)
        if self._caught is not None:
            self._previous(*self._caught)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = number, frame
