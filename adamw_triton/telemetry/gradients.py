"""What can stand out in gradients: not finite, rising, zero, missing, another one on each rank."""

from __future__ import annotations

from collections import defaultdict

import torch

from adamw_triton.telemetry.course import Course, streak
from adamw_triton.telemetry.seen import PATIENCE, Seen, Symptom, families, lasting, worst_first

USUAL = 10
"""Norms by which to know what is usual: their median, which spikes do not move."""
RISEN, RISING = 5.0, 5
"""Times what is usual, for so many steps. Where gradients grow in proportion to weights that begin at zero
(LoRA's, zero-initialized heads), twice is usual, and four times if the learning rate rises beside."""
EXPLODED, EXPLODING = 10.0, 3
"""The same of one tensor in four at most, while"""
QUIET = 2.0
"""is what the others reach."""
LOUD = 0.3
"""Of the norm of all gradients, what those that explode have at least: tensors that begin with hardly any
gradient may have a hundred times as much when they come to life."""
APART = 1e-5
"""By how much norms of the same tensors may differ, as sums in fp32 in another order do."""


def nonfinite(seen: Seen) -> Symptom | None:
    if not seen.broken:
        return None
    first = seen.broken[0]
    bad = first.each["nan_count"] + first.each["inf_count"]
    counts = {name: first.total[name] for name in ("nan_count", "inf_count")}
    skipped = sum(step.skipped for step in seen.broken)
    numbers = {**counts, "steps": len(seen.broken), "of them skipped": skipped}
    return Symptom(first.step, numbers, worst_first(Course([first]), bad > 0, bad) if bad.min() == 0 else ())


def diverging(seen: Seen) -> Symptom | None:
    norms, patience = seen.clean.total("grad_norm"), 2 if seen.lost else RISING
    if len(norms) < USUAL + patience:
        return None
    usual = norms[:-patience].median()
    lasted = int(streak(norms > RISEN * usual))
    if usual == 0 or lasted < patience:
        return None
    numbers = {"grad_norm": float(norms[-1]), "its median before": float(usual)}
    return Symptom(seen.clean.step(-lasted), numbers)


def exploding(seen: Seen) -> Symptom | None:
    norms = seen.clean.each("grad_norm")
    if len(norms) < USUAL + EXPLODING:
        return None
    before = norms[:-EXPLODING]
    usual = before.nanmedian(0).values
    known = ((before > 0).sum(0) >= USUAL) & (usual > 0)
    times = torch.where(known, norms[-EXPLODING:].amin(0) / usual, torch.nan)
    exploded, step = lasting(seen.clean, norms > EXPLODED * torch.where(known, usual, torch.inf), EXPLODING)
    if not 0 < int(exploded.sum()) <= len(exploded) / 4 or times.nanmedian() > QUIET:
        return None
    if norms[-1, exploded].norm() < LOUD * seen.clean.total("grad_norm")[-1]:
        return None
    names = worst_first(seen.clean, exploded, times)
    worst = seen.clean.names.index(names[0])
    numbers = {"grad_norm": float(norms[-1, worst]), "its median before": float(usual[worst])}
    return Symptom(step, numbers, names)


def no_gradient(seen: Seen) -> Symptom | None:
    lasted = int(streak(seen.clean.total("grad_norm") == 0))
    return Symptom(seen.clean.step(-lasted), {"grad_norm": 0.0}) if lasted >= PATIENCE else None


def dead(seen: Seen) -> Symptom | None:
    gone, step = lasting(seen.clean, seen.clean.each("grad_norm") == 0)
    gone &= seen.clean.numels > 0
    if not gone.any() or gone.all():
        return None
    return Symptom(step, {"grad_norm": 0.0}, worst_first(seen.clean, gone, seen.clean.numels))


def frozen(seen: Seen) -> Symptom | None:
    """Who has stopped to train; and who never has, though its like in an earlier layer does. To freeze the
    first layers is usual."""
    if len(seen.steps) < PATIENCE:
        return None
    trained = [{told.name for told in step.tensors} for step in seen.steps]
    recent, ever = (set[str]().union(*names) for names in (trained[-PATIENCE:], trained))
    first: dict[str, int] = {}
    for name in recent:
        for family, layer in families(name):
            first[family] = min(layer, first.get(family, layer))
    since: dict[str, int] = defaultdict(int)
    for name in seen.steps[-1].idle:
        passed_over = any(first.get(family, layer) < layer for family, layer in families(name))
        if name not in recent and (name in ever or passed_over):
            last = max((at for at, names in enumerate(trained) if name in names), default=-1)
            since[name] = seen.steps[last + 1].step
    return Symptom(min(since.values()), {"tensors": len(since)}, tuple(since)) if since else None


def ranks_differ(seen: Seen) -> Symptom | None:
    """In what one step saw of gradients and weights."""
    ranks = seen.ranks or ()
    if len({step.step for step in ranks}) != 1:
        return None
    stepped = [{told.name for told in step.tensors} for step in ranks]
    if some := set[str]().union(*stepped) - stepped[0].intersection(*stepped):
        return Symptom(ranks[0].step, {"tensors of some ranks alone": len(some)}, tuple(sorted(some)))
    course = Course(ranks)
    shown = {
        "grad_norm": course.each("grad_norm"),
        "weight_norm": course.each("weight_norm"),
        "lr": course.lr,
    }
    far = {
        name: ((each.amax(0) - each.amin(0)) / each.amax(0)).nan_to_num(0.0) for name, each in shown.items()
    }
    apart = torch.stack(list(far.values())).amax(0)
    if not (apart > APART).any():
        return None
    numbers = {f"{name} differs by": float(values.max()) for name, values in far.items()}
    return Symptom(course.step(0), numbers, worst_first(course, apart > APART, apart))
