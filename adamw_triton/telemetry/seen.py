"""What a diagnosis looks at, and what it may find there.

To call a run sick that is well costs its owner more than one finding missed. So what lasts counts, not what
happened once, and what is usual at the start or end of a schedule does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from math import isfinite
from typing import NamedTuple

from torch import Tensor

from adamw_triton.telemetry.course import Course, streak
from adamw_triton.telemetry.observed import Observed

PATIENCE = 10
"""Steps that something has to last. Spikes that recover are over sooner (AdaGC, arXiv:2502.11034; ZClip,
arXiv:2504.02507), and what is wrong is to be named within 20."""
STEADY = 0.9
"""What the lowest learning rate has to be of the highest for no warm-up, and no end of a schedule."""


class Symptom(NamedTuple):
    """That something stands out."""

    step: int
    """The first that shows it."""
    numbers: Mapping[str, float]
    """At the last one."""
    tensors: tuple[str, ...] = ()
    """Empty: all together."""


class Seen:
    """Steps in their order. ``ranks``: a step as each rank has seen it, none if they have none in common;
    None: nobody asked."""

    def __init__(self, steps: Sequence[Observed], ranks: Sequence[Observed] | None = None) -> None:
        self.steps = [step for step in steps if step.tensors]
        self.ranks = ranks
        finite = [_is_finite(step) for step in self.steps]
        self.broken = [step for step, good in zip(self.steps, finite, strict=True) if not good]
        """Steps that were skipped, or whose gradients or weights were not finite."""
        self.clean = Course([step for step, good in zip(self.steps, finite, strict=True) if good])
        """All others."""
        self.lost = bool(finite) and not finite[-1] and not self.broken[-1].skipped
        """Whether the last one has made weights NaN."""

    @cached_property
    def steady(self) -> bool:
        """Whether the learning rate neither rises nor falls."""
        lr = self.clean.highest_lr
        return bool(lr.min() >= STEADY * lr.max())


Test = Callable[[Seen], "Symptom | None"]


def _is_finite(step: Observed) -> bool:
    total = step.total
    bad = total["nan_count"] + total["inf_count"] > 0 or step.skipped
    return not bad and isfinite(total["grad_norm"]) and isfinite(total["weight_norm"])


def lasting(course: Course, held: Tensor, patience: int = PATIENCE) -> tuple[Tensor, int]:
    """Of which tensors something has held for so many steps up to the last one, bool [tensors], and the first
    step at which it did."""
    lasted = streak(held)
    which = lasted >= patience
    return which, course.step(-int(lasted[which].max())) if which.any() else 0


def worst_first(course: Course, which: Tensor, badness: Tensor) -> tuple[str, ...]:
    """Their names."""
    order = badness.nan_to_num(nan=0.0).argsort(descending=True, stable=True).tolist()
    return tuple(course.names[index] for index in order if which[index])


def share(part: Tensor, whole: Tensor, numels: Tensor) -> float:
    """Of the elements of some tensors those of others; 0 of none."""
    return float(numels[part & whole].sum() / numels[whole].sum().clamp(min=1))


def families(name: str) -> Iterator[tuple[str, int]]:
    """``blocks.*.mlp.weight``, 3 of ``blocks.3.mlp.weight``: what is alike in all layers, and the layer. Of
    several numbers each in its turn. Names that end in a number are places in a list, where nothing has to be
    alike."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if re.fullmatch(r"\d+", part) and not parts[-1].isdigit():
            yield ".".join([*parts[:at], "*", *parts[at + 1 :]]), int(part)
