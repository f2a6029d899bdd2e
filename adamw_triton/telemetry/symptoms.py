"""What can stand out in the course of training: a function each, and the limits they go by.

A run that is called sick though it is well costs its owner more than one finding missed: what lasts counts, not what
happened once, and what is usual at the start or end of a schedule does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton.telemetry.course import Course, streak
from adamw_triton.telemetry.observed import Observed, Told
from adamw_triton_kernels.work import NEAREST

PATIENCE = 10
"""Steps that something has to last: half of the 20 in which it is to be named, and longer than the spikes
that AdaGC and ZClip (arXiv:2502.11034, 2504.02507) show, which are over in a few steps."""
RISING = 5
"""Steps for which gradients have to stay above their usual norm: longer than a spike that recovers."""
BASE = 10
"""Steps by which to know what is usual."""
RISEN = 5.0
"""Times the median of norms so far. Twice is usual where gradients grow in proportion to weights that begin
at zero (LoRA's, zero-initialized heads), four times if the learning rate rises beside."""
EXPLODED = 10.0
"""The same of one tensor, while others do not reach ``QUIET``; over 3 steps."""
QUIET = 2.0
FAR = 1.0
"""Of update/weight ratios, added up over 5 steps: in these, weights were moved as far as they are long. The
ratio is 0.001 by rule of thumb; 0.02 at the first steps of small models that learn well."""
LOW = 1e-7
"""Of update/weight ratios: ten thousand steps in one direction would move weights by a thousandth. Tuning by
reinforcement, with the smallest learning rates in use, has 1e-6 to 1e-5."""
STEADY = 0.9
"""What the smallest learning rate seen has to be of the largest for no warm-up, and no schedule's end."""
MOSTLY = 0.5
EVERYTHING = 0.99
FAST_DECAY = 1e-4
"""lr*weight_decay, what is taken of weights in a step: without gradients they would be gone in ten thousand.
0.1 at 3e-4, as language models are trained, is 3e-5."""
WEIGHTY = 0.01
"""Of the largest tensor's elements: what is less is a norm or a bias."""
LARGE_EPS = 1e-6
"""Above, somebody wanted eps to matter."""
FLOORED = 0.25
"""Of v's codes those at the floor, though m's beside them are not zero; healthy runs have none of these."""
DRIFTED = 1e-5
"""By how much norms of the same tensors may differ between ranks: as sums in fp32 in another order do."""


class Symptom(NamedTuple):
    """That something stands out."""

    step: int
    """The first that shows it."""
    numbers: Mapping[str, float]
    """At the last one."""
    tensors: tuple[str, ...] = ()


class Seen:
    """
    Args:
        history: steps in their order.
        ranks: one step as each rank has seen it; empty: not asked.
    """

    def __init__(self, history: Sequence[Observed], ranks: Sequence[Observed] = ()) -> None:
        self.history = history
        self.ranks = ranks
        broken = [_is_broken(step) for step in history]
        self.broken = [step for step, wrong in zip(history, broken, strict=True) if wrong]
        """Steps on gradients that are not finite, and those after which nothing is finite any more."""
        self.clean = Course([step for step, wrong in zip(history, broken, strict=True) if not wrong])
        self.lost = bool(broken) and broken[-1] and self.broken[-1].total["clip_coefficient"] != 0
        """Whether such a step was taken, and none came that was better."""

    @cached_property
    def trained(self) -> list[set[str]]:
        """By step, which tensors had a gradient."""
        return [{told.name for told in step.tensors} for step in self.history]

    @cached_property
    def steady(self) -> bool:
        """Whether the learning rate neither rises nor falls."""
        highest = self.clean.given("lr").nan_to_num(0.0).amax(1)
        return bool(highest.min() >= STEADY * highest.max())


Test = Callable[[Seen], "Symptom | None"]


def _is_broken(step: Observed) -> bool:
    total = step.total
    if not total:
        return False
    bad = total["nan_count"] + total["inf_count"] > 0 or total["clip_coefficient"] == 0
    return bad or not all(torch.tensor([total["grad_norm"], total["weight_norm"]]).isfinite())


def nonfinite(seen: Seen) -> Symptom | None:
    if not seen.broken:
        return None
    first = seen.broken[0]
    bad = first.each["nan_count"] + first.each["inf_count"]
    course = Course([first])
    numbers = {name: first.total[name] for name in ("nan_count", "inf_count")}
    return Symptom(first.step, {**numbers, "steps": len(seen.broken)}, _names(course, bad > 0, bad))


def diverging(seen: Seen) -> Symptom | None:
    norms, lasting = seen.clean.total("grad_norm"), 2 if seen.lost else RISING
    if len(norms) < BASE + lasting:
        return None
    usual = norms[:-lasting].median()
    risen = norms > RISEN * usual
    if usual == 0 or streak(risen) < lasting:
        return None
    return _since(seen, streak(risen), {"grad_norm": norms[-1], "median": usual})


def exploding(seen: Seen) -> Symptom | None:
    norms, lasting = seen.clean.each("grad_norm"), 3
    if len(norms) < BASE + lasting:
        return None
    usual = norms[:-lasting].nanmedian(0).values
    known = (norms[:-lasting] > 0).sum(0) >= BASE
    times = torch.where(known & (usual > 0), norms[-lasting:].amin(0) / usual, torch.nan)
    risen = times > EXPLODED
    if not 0 < int(risen.sum()) <= len(risen) / 4 or times.nanmedian() > QUIET:
        return None
    lasted = streak(norms > EXPLODED * usual)[risen].max()
    worst = int(times.nan_to_num(0.0).argmax())
    numbers = {"grad_norm": norms[-1, worst], "median": usual[worst]}
    return _since(seen, lasted, numbers, _names(seen.clean, risen, times))


def lr_high(seen: Seen) -> Symptom | None:
    ratios, window = seen.clean.total("update_ratio"), 5
    # What begins at zero is moved farther than it is long, whatever the learning rate.
    if len(ratios) < window or not ratios.isfinite().all():
        return None
    moved = ratios.unfold(0, window, 1).sum(1)
    if not (moved >= FAR).any():
        return None
    at = int((moved >= FAR).long().argmax())
    worst = at + int(ratios[at : at + window].argmax())
    numbers = {"update_ratio": float(ratios[worst]), "lr": _lr(seen.clean, worst)}
    return Symptom(seen.clean.step(at), numbers)


def lr_low(seen: Seen) -> Symptom | None:
    low = seen.clean.total("update_ratio") < LOW
    if streak(low) < PATIENCE or not seen.steady:
        return None
    ratio = seen.clean.total("update_ratio")[-1]
    return _since(seen, streak(low), {"update_ratio": ratio, "lr": _lr(seen.clean, -1)})


def decay_strong(seen: Seen) -> Symptom | None:
    course = seen.clean
    shares, numels = course.each("decay_share"), course.numels
    gone = course.given("lr") * course.given("weight_decay")
    weighty = (numels >= WEIGHTY * numels.max()) & (gone[-1] > 0)
    mostly = (shares > MOSTLY) & (gone > FAST_DECAY) & weighty
    lasted = streak(mostly)
    strong = lasted >= PATIENCE
    # One alone may be an embedding, of large weights and rare tokens.
    if strong.sum() <= MOSTLY * weighty.sum():
        return None
    numbers = {
        "decay_share": course.total("decay_share")[-1],
        "weight_decay": course.given("weight_decay")[-1, strong].max(),
        "lr": _lr(course, -1),
    }
    return _since(seen, lasted.max(), numbers, _names(course, strong, shares[-1]))


def decay_off(seen: Seen) -> Symptom | None:
    if len(seen.history) < PATIENCE:
        return None
    decay = {told.name: told.weight_decay for told in seen.clean.told}
    families: dict[str, dict[str, float]] = defaultdict(dict)
    for name in decay:
        for family, _ in _families(name):
            families[family][name] = decay[name]
    missing = [
        name
        for family in families.values()
        for name, own in family.items()
        if own == 0 and sum(other > 0 for other in family.values()) > MOSTLY * len(family)
    ]
    numbers = {"weight_decay": 0.0, "of others": max(decay.values(), default=0.0)}
    return Symptom(seen.clean.step(0), numbers, tuple(dict.fromkeys(missing))) if missing else None


def all_lost(seen: Seen) -> Symptom | None:
    rounded, still = _rounded(seen.clean), _still(seen.clean)
    if not still.any() or _share(still, rounded, seen.clean.numels) < 0.9:
        return None
    return _of_lost(seen, still)


def lost_updates(seen: Seen) -> Symptom | None:
    course, rounded = seen.clean, _rounded(seen.clean)
    lost, lr = course.each("lost_share")[:, rounded], course.given("lr").nan_to_num(0.0).amax(1)
    if len(lost) < PATIENCE or not rounded.any():
        return None
    numels = torch.where(lost.isnan(), 0.0, course.numels[rounded])
    total = (lost.nan_to_num(0.0) * numels).sum(1) / numels.sum(1)
    still, warming = _still(course), lr[-1] > lr[-PATIENCE]
    if warming or not (still.any() or streak(total > MOSTLY) >= PATIENCE):
        return None
    mostly = rounded & (streak(course.each("lost_share") > MOSTLY) >= PATIENCE)
    return _of_lost(seen, mostly | still)


def _of_lost(seen: Seen, which: Tensor) -> Symptom:
    course = seen.clean
    shares = course.each("lost_share")
    numbers = {
        "lost_share": (shares[-1] * course.numels)[which].nansum() / course.numels[which].sum(),
        "update_ratio": course.total("update_ratio")[-1],
        "lr": _lr(course, -1),
    }
    lasted = streak(shares > MOSTLY)[which].max().clamp(min=PATIENCE)
    return _since(seen, lasted, numbers, _names(course, which, shares[-1]))


def _rounded(course: Course) -> Tensor:
    """Which tensors have 16 bits, rounded to nearest. bool [tensors]"""
    return torch.tensor([t.weights == NEAREST and t.dtype.itemsize == 2 for t in course.told], dtype=torch.bool)


def _still(course: Course) -> Tensor:
    """Which of these have not moved for long though updated. Elements without updates are not lost: where
    there are many, as of rare tokens, that the norm stays tells it."""
    lost, norms = course.each("lost_share"), course.each("weight_norm")
    if len(lost) <= PATIENCE:
        return torch.zeros(len(course.names), dtype=torch.bool)
    same = (norms[-PATIENCE:] == norms[-PATIENCE - 1 : -1]).all(0) & (lost[-PATIENCE:] > 0).all(0)
    return _rounded(course) & (same | (lost[-PATIENCE:] >= EVERYTHING).all(0))


def no_gradient(seen: Seen) -> Symptom | None:
    lasted = streak(seen.clean.total("grad_norm") == 0)
    return _since(seen, lasted, {"grad_norm": 0.0}) if lasted >= PATIENCE else None


def dead(seen: Seen) -> Symptom | None:
    lasted = streak(seen.clean.each("grad_norm") == 0)
    gone = (lasted >= PATIENCE) & (seen.clean.numels > 0)
    if not gone.any() or gone.all():
        return None
    return _since(seen, lasted[gone].max(), {"grad_norm": 0.0}, _names(seen.clean, gone, lasted))


def frozen(seen: Seen) -> Symptom | None:
    """What has stopped to train, and what never has although such a tensor of an earlier layer does: to
    freeze the first layers is usual."""
    busy = [(step, names) for step, names in zip(seen.history, seen.trained, strict=True) if names]
    if len(busy) < PATIENCE:
        return None
    recent = set[str]().union(*(names for _, names in busy[-PATIENCE:]))
    ever = set[str]().union(*(names for _, names in busy))
    indices: dict[str, list[int]] = defaultdict(list)
    for name in recent:
        for family, index in _families(name):
            indices[family].append(index)
    left = {}
    for name in busy[-1][0].idle:
        earlier = any(min(indices[family], default=index) < index for family, index in _families(name))
        if name not in recent and (name in ever or earlier):
            left[name] = next(
                step.step
                for at, (step, _) in enumerate(busy)
                if not any(name in names for _, names in busy[at:])
            )
    return Symptom(min(left.values()), {"tensors": len(left)}, tuple(left)) if left else None


def eps_floor(seen: Seen) -> Symptom | None:
    course = seen.clean
    roots = _roots(course)
    eps = torch.stack([step.hyper[:, 4].max() for step in seen.history if len(step.hyper)] or [torch.zeros(())])
    below = (roots < eps.max()) & (course.each("grad_norm") > 0)
    floored = streak(below) >= PATIENCE
    everything = torch.ones_like(floored)
    if eps.max() > LARGE_EPS or _share(floored, everything, course.numels) <= MOSTLY:
        return None
    numbers = {"root of exp_avg_sq_mean": roots[-1, floored].median(), "eps": eps.max()}
    return _since(seen, streak(below).max(), numbers, _names(course, floored, course.numels))


def code_floor(seen: Seen) -> Symptom | None:
    harmed = seen.clean.each("bottom_share") - seen.clean.each("zero_share")
    lasted = streak(harmed > FLOORED)
    floored = lasted >= PATIENCE
    if not floored.any():
        return None
    worst = int(torch.where(floored, harmed[-1], 0.0).argmax())
    numbers = {name: seen.clean.each(name)[-1, worst] for name in ("bottom_share", "zero_share")}
    return _since(seen, lasted[floored].max(), numbers, _names(seen.clean, floored, harmed[-1]))
