"""Steps are written whole: Ctrl-C waits for the end of one; after an error inside one there is no next."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class DeferredInterrupt:
    """A context in which SIGINT waits until the end. Only the main thread of a process gets signals;
    elsewhere, and where a handler was not set from Python, this does nothing."""

    def __enter__(self) -> None:
        self._caught: tuple[int, FrameType | None] | None = None
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):
                self._previous = previous
                signal.signal(signal.SIGINT, self._catch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is None:
            return
        signal.signal(signal.SIGINT, self._previous)
        if self._caught is not None:
            self._previous(*self._caught)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = number, frame


class WholeSteps:
    """Guards what a step writes."""

    def __init__(self) -> None:
        self._failure: str | None = None

    @contextlib.contextmanager
    def commit(self, *, in_graph: bool = False) -> Iterator[None]:
        """Around all that a step writes: none of it or all of it, as far as can be. What goes into a CUDA
        graph is written by its replays alone, so an error there leaves nothing halfway."""
        with DeferredInterrupt():
            try:
                yield
            except BaseException as error:
                if not in_graph:
                    self.fail(error)
                raise

    def fail(self, error: BaseException) -> None:
        """Refuse to go on, because of this error."""
        self._failure = f"{type(error).__name__}: {error}"

    def check(self) -> None:
        """
        Raises:
            RuntimeError: a step or a load failed halfway.
        """
        if self._failure is not None:
            raise RuntimeError(
                "an earlier step or load failed halfway: some parameters and their state have been updated "
                "and others not. Load a checkpoint of the model and then of the optimizer (load_state_dict). "
                f"It had failed with {self._failure}"
            )
