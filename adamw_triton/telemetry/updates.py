"""What can stand out in updates: too large, too small, rounded away, mostly decay, at the floor of v."""

from __future__ import annotations

from collections import defaultdict
from math import inf

import torch
from torch import Tensor

from adamw_triton.telemetry.course import Course, streak
from adamw_triton.telemetry.seen import PATIENCE, Seen, Symptom, families, lasting, share, worst_first

FAR, STEPS = 1.0, 5
"""Of update/weight ratios, added up over so many steps: in these, weights were moved as far as they are long.
The ratio is 0.001 by rule of thumb, and 0.02 in the first steps of small models that learn well."""
LOW = 1e-7
"""Of the ratio: ten thousand steps in one direction would move weights by a thousandth. The lowest learning
rates in use, of reinforcement, have 1e-6 to 1e-5."""
MOSTLY = 0.5
EVERYTHING, STILL = 0.99, 0.9
"""Of a tensor's elements those whose update is lost, and of all elements those of such tensors."""
FAST_DECAY = 1e-4
"""lr*weight_decay: without gradients, weights would be gone in ten thousand steps. Where language models are
trained with 3e-4*0.1, it takes three times as many."""
USUAL_DECAY = 0.3
"""The highest weight_decay in well-known recipes (vision transformers'). If less is too strong, lr is."""
WEIGHTY = 0.01
"""Of the largest tensor's elements: what has less is a norm or a bias."""
MEANT = 1e-6
"""An eps above it is meant to matter."""
FLOORED = 0.5
"""Of v's codes those at the floor. Healthy layers have under 0.01."""


def lr_high(seen: Seen) -> Symptom | None:
    return _moved_far(seen.clean) or _decays_fast(seen.clean, below=USUAL_DECAY)


def _moved_far(course: Course) -> Symptom | None:
    ratios = course.total("update_ratio")
    # Weights that are all zero at first are moved farther than they are long by any learning rate.
    if len(ratios) < STEPS or not ratios.isfinite().all():
        return None
    moved = ratios.unfold(0, STEPS, 1).sum(1) >= FAR
    if not moved.any():
        return None
    begin = int(moved.long().argmax())
    window = ratios[begin : begin + STEPS]
    first, worst = begin + int((window >= FAR / STEPS).long().argmax()), begin + int(window.argmax())
    numbers = {"update_ratio": float(ratios[worst]), "lr": float(course.highest_lr[worst])}
    return Symptom(course.step(first), numbers)


def lr_low(seen: Seen) -> Symptom | None:
    ratios = seen.clean.total("update_ratio")
    lasted = int(streak(ratios < LOW))
    if lasted < PATIENCE or not seen.steady:
        return None
    numbers = {"update_ratio": float(ratios[-1]), "lr": float(seen.clean.highest_lr[-1])}
    return Symptom(seen.clean.step(-lasted), numbers)


def decay_strong(seen: Seen) -> Symptom | None:
    return _decays_fast(seen.clean, above=USUAL_DECAY)


def _decays_fast(course: Course, *, above: float = 0.0, below: float = inf) -> Symptom | None:
    """By a weight_decay in these limits."""
    if len(course) < PATIENCE:
        return None
    decay = course.weight_decay
    decayed = (course.numels >= WEIGHTY * course.numels.max()) & (decay[-1] > above) & (decay[-1] <= below)
    fast = (course.lr * decay > FAST_DECAY) & (course.each("decay_share") > MOSTLY)
    strong, step = lasting(course, decayed & fast)
    # A few alone may be embeddings, of large weights and rare tokens.
    if not strong.any() or strong.sum() <= MOSTLY * decayed.sum():
        return None
    numbers = {
        "decay_share": float(course.total("decay_share")[-1]),
        "weight_decay": float(decay[-1, strong].max()),
        "lr": float(course.highest_lr[-1]),
    }
    return Symptom(step, numbers, worst_first(course, strong, course.each("decay_share")[-1]))


def decay_off(seen: Seen) -> Symptom | None:
    """Who has none, though most of its like in other layers have, of as many dimensions: in a list of modules
    a norm's weight is called as a matrix is."""
    if len(seen.clean) < PATIENCE:
        return None
    alike: dict[tuple[str, int], list[tuple[str, float]]] = defaultdict(list)
    for told in seen.clean.told:
        for family, _ in families(told.name):
            alike[family, told.dims].append((told.name, told.weight_decay))
    off = {
        name: max(decay for _, decay in members)
        for members in alike.values()
        for name, own in members
        if own == 0 and sum(decay > 0 for _, decay in members) > MOSTLY * len(members)
    }
    if not off:
        return None
    return Symptom(seen.clean.step(0), {"weight_decay": 0.0, "of others": max(off.values())}, tuple(off))


def all_lost(seen: Seen) -> Symptom | None:
    still = _still(seen.clean)
    if not still.any() or share(still, seen.clean.rounded, seen.clean.numels) < STILL:
        return None
    return _of_lost(seen.clean, still)


def lost_updates(seen: Seen) -> Symptom | None:
    course = seen.clean
    if len(course) < PATIENCE or not course.rounded.any():
        return None
    lost = course.each("lost_share")
    numels = torch.where(lost.isnan(), 0.0, course.numels)[:, course.rounded]
    most = (lost.nan_to_num(0.0)[:, course.rounded] * numels).sum(1) > MOSTLY * numels.sum(1)
    still = _still(course)
    warming = course.highest_lr[-1] > course.highest_lr[-PATIENCE]
    if warming or not (still.any() or streak(most) >= PATIENCE):
        return None
    return _of_lost(course, still | lasting(course, course.rounded & (lost > MOSTLY))[0])


def _of_lost(course: Course, which: Tensor) -> Symptom | None:
    lost = course.each("lost_share")
    count = (lost[-1] * course.numels)[which].nansum()
    numbers = {
        "lost_share": float(count / course.numels[which].sum()),
        "update_ratio": float(course.total("update_ratio")[-1]),
        "lr": float(course.highest_lr[-1]),
    }
    lasted = int(streak(lost > MOSTLY)[which].max().clamp(min=PATIENCE))
    return Symptom(course.step(-lasted), numbers, worst_first(course, which, lost[-1]))


def _still(course: Course) -> Tensor:
    """Which tensors updates have left as they were for long. An element without any update is not lost, and
    of rare tokens there are many: that the norm is the same to the bit says it of these. bool [tensors]"""
    lost, norms = course.each("lost_share")[-PATIENCE:], course.each("weight_norm")[-PATIENCE - 1 :]
    if len(lost) < PATIENCE:
        return torch.zeros_like(course.rounded)
    same = (norms == norms[-1]).all(0) & (lost > 0).all(0)
    return course.rounded & (same | (lost >= EVERYTHING).all(0))


def eps_floor(seen: Seen) -> Symptom | None:
    course = seen.clean
    root, eps = (
        course.each("exp_avg_sq_mean").sqrt() * course.hyper("inv_root_correction2"),
        course.hyper("eps"),
    )
    below = (root < eps) & (eps <= MEANT) & (course.each("grad_norm") > 0)
    floored, step = lasting(course, below)
    if share(floored, torch.ones_like(floored), course.numels) <= MOSTLY:
        return None
    numbers = {"root of v": float(root[-1, floored].median()), "eps": float(eps[-1, floored].max())}
    return Symptom(step, numbers, worst_first(course, floored, course.numels))


def code_floor(seen: Seen) -> Symptom | None:
    """In layers: outside of them there are embeddings, which have the floor for tokens that never came."""
    course = seen.clean
    shares = course.each("bottom_share")
    layers = torch.tensor([any(families(name)) for name in course.names], dtype=torch.bool, device="cpu")
    floored, step = lasting(course, layers & (shares > FLOORED))
    if not floored.any():
        return None
    return Symptom(
        step, {"bottom_share": float(shares[-1, floored].max())}, worst_first(course, floored, shares[-1])
    )
