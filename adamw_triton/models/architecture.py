"""What somebody who knows an architecture tells of it: this room takes the function, and imports nobody."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from adamw_triton.models.weights import Weight


class Architecture(NamedTuple):
    """A model as it is built from its config.json."""

    weights: Sequence[Weight]
    """Its parameters, tied ones once; no buffers."""
    by: str
    """Who built it, and as what."""
    config: Mapping[str, Any]
    """Sizes under the names that ``config.Dimensions`` is read from, also those that the file leaves out."""


class CannotBuildError(ValueError):
    """It is not known here; the message says why, as a part of a sentence. Empty: nobody was asked."""


class MissingLibraryError(CannotBuildError):
    """Nobody could be asked: the library is not installed."""

    def __init__(self, library: str) -> None:
        super().__init__(f"{library} is not installed")
        self.library = library


Build = Callable[[Mapping[str, Any], str], Architecture]
"""From the config, and the dtype of the weights as safetensors writes it."""


Orders = Callable[[Mapping[str, Any]], Sequence[Sequence[Sequence[str]]]]
"""From the config, the ways in which a training may hand parameters to its optimizer: each in groups of their
names."""


def unknown(config: Mapping[str, Any], dtype: str) -> Architecture:
    """A ``Build`` for want of one."""
    raise CannotBuildError
