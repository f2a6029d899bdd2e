"""``python -m bench convergence``: do the formats train to the loss of fp32, and how would one know?

A byte transformer is trained from several seeds with every state format, and with fp32 a second time on
other batches of the same text: how far that moves the loss is the noise of fp32 itself. A format's losses
less fp32's, seed by seed, are told beside that band.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench import suite
from bench.peers import FORMATS, Format
from bench.report import Cell, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
BASE, AGAIN = "torch fp32", "torch fp32, other batches"
OTHER = 1000
"""Added to the seed of the other batches."""
TESTED = 16
"""Batches that the final loss is the mean of, the same for all."""


@dataclass(frozen=True)
class Task:
    """One training."""

    width: int = 64
    depth: int = 2
    batch: int = 8
    context: int = 64
    steps: int = 200


def final_loss(task: Task, format: Format, seed: int, device: str, other: int = 0) -> float:
    """Nats a byte on held-out text, after training."""
    from adamw_triton.demo.corpus import Batches, load_corpus, split
    from adamw_triton.demo.model import ByteTransformer

    torch.manual_seed(seed)
    model = ByteTransformer(width=task.width, depth=task.depth, context=task.context).to(device)
    params = list(model.parameters())
    optimizer = format.build(params, LR, BETAS, EPS)
    train, held_out = split(load_corpus())

    def loss(batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    for batch in itertools.islice(Batches(train, task.batch, task.context, seed + other, device), task.steps):
        model.zero_grad()
        torch.autograd.backward(loss(batch))
        optimizer.step()
    with torch.no_grad():
        batches = itertools.islice(Batches(held_out, 32, task.context, 0, device), TESTED)
        return statistics.fmean(loss(batch).item() for batch in batches)


Losses = dict[str, list[float]]
"""By format, one a seed."""


def losses(task: Task, formats: Sequence[Format], seeds: Sequence[int], device: str) -> Losses:
    """Every format from every seed, and fp32 twice."""
    base = next(one for one in formats if one.key == BASE)
    found = {one.key: [final_loss(task, one, seed, device) for seed in seeds] for one in formats}
    found[AGAIN] = [final_loss(task, base, seed, device, OTHER) for seed in seeds]
    return found


def differences(found: Mapping[str, Sequence[float]], key: str) -> list[float]:
    """A format's losses less fp32's from the same seed."""
    return [a - b for a, b in zip(found[key], found[BASE], strict=True)]


def band(found: Mapping[str, Sequence[float]]) -> float:
    """How far other batches move fp32's own loss: the root mean square over the seeds."""
    return math.sqrt(statistics.fmean(d * d for d in differences(found, AGAIN)))


def outside(found: Mapping[str, Sequence[float]], key: str) -> bool:
    """Whether a format's mean loss is above fp32's by more than the band; a NaN is."""
    return not statistics.fmean(differences(found, key)) <= band(found)


def table(found: Losses, formats: Sequence[Format], reasons: Mapping[str, str]) -> Table:
    rows: list[list[Cell | str]] = []
    for format in formats:
        if format.key not in found:
            rows.append([format.label, "cannot run", "", "", ""])
            continue
        apart = differences(found, format.key)
        mean = statistics.fmean(apart)
        verdict = Cell("above", "bad") if outside(found, format.key) else Cell("within", "good")
        cells = [f"{statistics.fmean(found[format.key]):.4f}", f"{mean:+.4f}", f"{max(apart):+.4f}"]
        rows.append([Cell(format.label, "bold" if format.ours else ""), *cells,
                     "" if format.key == BASE else verdict])  # fmt: skip
    notes = [
        f"the band: how far other batches of the same text move fp32's own loss (rms), {band(found):.4f}",
        *(f"{key} cannot run here: {reason}" for key, reason in reasons.items()),
    ]
    columns = ["format", "mean loss", "less fp32's", "worst seed", "the band"]
    return Table(f"Held-out loss, {len(found[BASE])} seeds", columns, rows, notes)


def figure(found: Losses, formats: Sequence[Format]) -> Figure:
    """A dot a seed, by format; the grey band is fp32's own noise."""
    from matplotlib.figure import Figure

    shown = [one for one in formats if one.key in found and one.key != BASE]
    labels = {AGAIN: "torch.optim.AdamW, other batches"} | {one.key: one.label for one in shown}
    drawing = Figure(figsize=(9, 1.4 + 0.4 * len(labels)), layout="constrained")
    axes = drawing.subplots()
    edge = band(found)
    axes.axvspan(-edge, edge, color="0.85", lw=0, label="noise of fp32 itself")
    axes.axvline(0, color="0.5", lw=0.8)
    ours = {one.key for one in shown if one.ours}
    for place, key in enumerate(reversed(labels)):
        apart = differences(found, key)
        colour = suite.OURS if key in ours else "0.3" if key == AGAIN else "#D55E00"
        axes.plot(apart, [place] * len(apart), "o", ms=6, alpha=0.55, color=colour, mew=0)
        axes.plot([statistics.fmean(apart)] * 2, [place - 0.3, place + 0.3], color=colour, lw=2.2)
    axes.set_yticks(range(len(labels)), list(reversed(labels.values())))
    axes.set_xscale("symlog", linthresh=max(edge, 1e-4))
    axes.set_xlabel(
        "held-out loss less fp32's from the same seed, nats a byte (a dot a seed; the bar is the mean)"
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_title("Does the format change what is learned?", loc="left", weight="bold")
    suite.axes_style(axes)
    return drawing


def main(argv: Sequence[str]) -> int:
    """Train, show and save; 1 if a format of ours is outside the band."""
    from bench.suites.fidelity import probe

    parser = suite.parser("convergence", __doc__)
    parser.set_defaults(
        device="cpu"
    )  # also beside a GPU: the formulas that stand for CUDA kernels are the CPU's
    options = parser.parse_args(argv)
    task = Task(width=32, depth=1, steps=40) if options.quick else Task()
    seeds = range(options.seed, options.seed + (2 if options.quick else 4))
    sizes, reasons = probe(FORMATS)
    formats = [one for one in FORMATS if one.key in sizes]
    found = losses(task, formats, seeds, options.device)
    data = {
        "task": vars(task),
        "seeds": list(seeds),
        "band": band(found),
        "losses": found,
        "cannot_run": reasons,
    }
    suite.finish(
        "convergence", argv, options, [table(found, FORMATS, reasons)], data, lambda: figure(found, formats)
    )
    return int(any(outside(found, one.key) for one in formats if one.ours))
