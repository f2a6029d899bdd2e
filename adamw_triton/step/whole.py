"""Steps are written whole: Ctrl-C waits for the end of one; after an error inside one there is no next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from adamw_triton.interrupts import DeferredInterrupt


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
