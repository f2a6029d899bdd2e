"""``python -m bench precision``: what 16-bit weights lose at the learning rates of fine-tuning.

The demo's model is trained in pure bf16 at lr 1e-5, from the same start on the same batches, with fp32
weights, with each way of ours to keep 16-bit ones, and with the peers'. Forward and backward are in bf16
everywhere: with fp32 weights, on their rounding. So only the update differs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn

from bench import report, suite
from bench.low_precision import EXACT, EXACT8, FLOAT32, HOW, NEAREST, STOCHASTIC, WAYS, Way
from bench.report import Cell, Table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEAN = 50
"""Steps that a loss is the mean of: every one has the same batches in all curves."""
TESTED = 16
"""Batches of held-out text."""


@dataclass(frozen=True)
class Task:
    """One training."""

    steps: int = 1000
    width: int = 128
    depth: int = 2
    batch: int = 8
    context: int = 64
    lr: float = 1e-5


@dataclass(frozen=True)
class Curve:
    """One way's training."""

    losses: list[float]
    """Nats a byte, of every step's batch before it."""
    held_out: float
    """After the last one."""
    lost: float
    """Of the change that the gradients of the last ``MEAN`` steps asked of the weights, the share that did
    not come about."""
    params: Tensor
    """All of them, at the end."""
    seconds: float

    @property
    def means(self) -> list[float]:
        """Over ``MEAN`` steps, from the first that has so many behind it."""
        width = min(MEAN, len(self.losses))
        sums = list(itertools.accumulate(self.losses, initial=0.0))
        return [(b - a) / width for a, b in zip(sums, sums[width:], strict=False)]

    @property
    def final(self) -> float:
        return self.means[-1]

    @property
    def gain(self) -> float:
        return self.losses[0] - self.final

    def distance(self, other: Curve) -> float:
        """The largest, of the means."""
        return max(abs(a - b) for a, b in zip(self.means, other.means, strict=True))

    def unlike(self, other: Curve) -> int:
        """Losses and parameters that are not the same bits."""
        differ = sum(a != b for a, b in zip(self.losses, other.losses, strict=True))
        return differ + int((self.params != other.params).sum())


def train(task: Task, way: Way, seed: int, device: str) -> Curve:
    from adamw_triton.demo.corpus import Batches, load_corpus, split
    from adamw_triton.demo.model import ByteTransformer

    began = time.perf_counter()
    torch.manual_seed(seed)
    model = ByteTransformer(width=task.width, depth=task.depth, context=task.context)
    params = list(model.to(device, torch.bfloat16).parameters())
    asking = Asking(params, task.lr)
    optimizer = way.build(params, task.lr)
    text, held_out = split(load_corpus())

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())

    losses, before = [], torch.empty(0)
    batches = Batches(text, task.batch, task.context, seed, device)
    for step, batch in enumerate(itertools.islice(batches, task.steps)):
        if step == max(1, task.steps - MEAN):
            before = known(way, optimizer, params)
            asking.begin()
        model.zero_grad()
        found = loss(batch)
        torch.autograd.backward(found)
        asking.step()
        optimizer.step()
        losses.append(found.item())
    asked, changed = asking.asked(), known(way, optimizer, params) - before
    with torch.no_grad():
        tested = itertools.islice(Batches(held_out, 32, task.context, 0, device), TESTED)
        final = statistics.fmean(loss(batch).item() for batch in tested)
    lost = 1 - float(changed @ asked / (asked @ asked))
    return Curve(losses, final, lost, flat(params), time.perf_counter() - began)


class Asking:
    """What the gradients ask for: torch's AdamW with everything in fp32, whose weights nobody uses."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        self.params = params
        self.weights = [p.detach().float().requires_grad_() for p in params]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, **HOW)
        self.before = torch.empty(0)

    def step(self) -> None:
        for p, weight in zip(self.params, self.weights, strict=True):
            weight.grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()

    def begin(self) -> None:
        self.before = flat(self.weights)

    def asked(self) -> Tensor:
        """Since then: the change in float64."""
        return flat(self.weights) - self.before


@torch.no_grad()
def known(way: Way, optimizer: Any, params: Sequence[Tensor]) -> Tensor:
    return flat([way.known(optimizer, p) for p in params])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in tensors])


# --- What is shown -------------------------------------------------------------------------------------

Curves = Mapping[str, Curve]


@dataclass(frozen=True)
class Goal:
    text: str
    measured: float
    met: bool


def kept(curves: Curves, label: str) -> float:
    """Of what the loss falls by with fp32 weights, the share that it falls by."""
    return curves[label].gain / curves[FLOAT32].gain


def goals(curves: Curves) -> list[Goal]:
    """Nearest falls behind, exact lies on fp32's curve."""
    exact, fp32 = curves[EXACT], curves[FLOAT32]
    unlike = exact.unlike(fp32)
    behind = curves[NEAREST].distance(fp32)
    found = [
        Goal("exact: losses and weights that are not fp32's, bit for bit, 0", unlike, unlike == 0),
        Goal("nearest: of fp32's gain at most 80%", kept(curves, NEAREST), kept(curves, NEAREST) <= 0.8),
        Goal("nearest: lost at least half", curves[NEAREST].lost, curves[NEAREST].lost >= 0.5),
    ]
    for label in (EXACT8, STOCHASTIC):
        apart = curves[label].distance(fp32) / behind
        found.append(
            Goal(f"{label}: from fp32's curve at most a twentieth of nearest's", apart, apart <= 0.05)
        )
    return found


def table(curves: Curves, reasons: Mapping[str, str], task: Task) -> Table:
    rows: list[list[Cell | str]] = []
    for way in WAYS:
        name = Cell(way.label, "bold" if way.ours else "")
        if way.label not in curves:
            rows.append([name, "cannot run", "", "", "", ""])
            continue
        curve = curves[way.label]
        apart = curve.distance(curves[FLOAT32])
        figures = [f"{curve.final:.4f}", f"{kept(curves, way.label):.1%}", number(apart) if apart else "0"]
        rows.append([name, *figures, f"{curve.lost:+.1%}", f"{curve.held_out:.4f}"])
    notes = [
        f"loss: nats a byte on training text, the mean of the last {MEAN} steps; of fp32's gain: how far it "
        "fell from the first step's, which is the same in all",
        f"from fp32's curve: the largest distance of the means over {MEAN} steps, all of the same batches",
        f"lost: of the change that the gradients of the last {MEAN} steps asked of the weights (AdamW in "
        "fp32), the share that did not come about; negative: more came about than was asked for, as 8-bit "
        "state has it that freezes v",
        "forward and backward are in bf16 everywhere: with fp32 weights on their rounding",
        *(f"{label} cannot run here: {reason}" for label, reason in reasons.items()),
    ]
    return Table(
        f"A byte transformer in bf16, lr {task.lr:g}, {task.steps:,} steps",
        ["weights", "loss", "of fp32's gain", "from fp32's curve", "lost", "held-out loss"],
        rows,
        notes,
    )


def goal_table(found: Sequence[Goal]) -> Table:
    verdicts = {True: Cell("met", "good"), False: Cell("missed", "bad")}
    rows = [
        [goal.text, number(goal.measured) if goal.measured else "0", verdicts[goal.met]] for goal in found
    ]
    return Table("Goals", ["goal", "measured", "verdict"], rows)


COLOURS = {FLOAT32: "0.7", EXACT: suite.OURS, EXACT8: "#56B4E9", STOCHASTIC: "#009E73", NEAREST: "#D55E00"}
OTHERS = ("#555555", "#E69F00", "#8C564B", "#CC79A7")
"""Peers, in their order."""


def figure(curves: Curves, task: Task) -> Figure:
    """Left the losses of ours, right how far all have been from fp32's, on a logarithmic axis."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 5.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    fp32, others = curves[FLOAT32].means, iter(OTHERS)
    steps = range(task.steps - len(fp32) + 1, task.steps + 1)
    lines = []
    for way in WAYS:
        colour = COLOURS.get(way.label) or next(others)
        if way.label not in curves:
            continue
        means = curves[way.label].means
        apart = list(itertools.accumulate((abs(a - b) for a, b in zip(means, fp32, strict=True)), max))
        style: dict[str, Any] = {"color": colour, "lw": 2.4 if way.ours else 1.2, "label": way.label}
        if way.label == FLOAT32:
            lines += left.plot(steps, means, **style | {"lw": 6})
        elif way.ours:
            on_another = {EXACT: (0, (3, 9)), EXACT8: (6, (3, 9))}
            label = way.label if apart[-1] else f"{way.label}: distance 0"
            ls = on_another.get(way.label, "-")
            lines += left.plot(
                steps, means, **style | {"label": label, "ls": ls, "zorder": 3 if ls != "-" else 2}
            )
        if apart[-1]:
            (line,) = right.semilogy(steps, apart, **style)
            lines += [] if way.ours else [line]
    left.set_ylabel(f"loss, nats a byte (mean of {MEAN} steps)")
    right.set_ylabel("largest distance from fp32's curve so far, nats a byte")
    for axes in (left, right):
        axes.set_xlabel("step")
        suite.axes_style(axes)
    drawing.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    title = f"Training pure bf16 at lr {task.lr:g}: how near weights come to fp32's"
    drawing.suptitle(title, x=0.01, ha="left", weight="bold")
    return drawing


def record(curve: Curve) -> dict[str, Any]:
    """For the JSON."""
    return {
        "losses": [round(loss, 5) for loss in curve.losses],
        "final": curve.final,
        "held_out": curve.held_out,
        "lost": curve.lost,
        "seconds": curve.seconds,
    }


def main(argv: Sequence[str]) -> int:
    """Train, show and save; 1 if a goal is missed."""
    parser = suite.parser("precision", __doc__)
    parser.set_defaults(device="cpu")  # also beside a GPU: the same bits want the same sums in backward
    options = parser.parse_args(argv)
    task = Task(steps=150, width=64, depth=1, context=32, lr=3e-5) if options.quick else Task()
    curves: dict[str, Curve] = {}
    reasons: dict[str, str] = {}
    for way in track(WAYS, "precision", console=report.console()):
        try:
            curves[way.label] = train(task, way, options.seed, options.device)
        except Exception as error:  # a peer may fail in any way
            if way.ours:
                raise
            reasons[way.label] = f"{type(error).__name__}: {error}".splitlines()[0]
    found = goals(curves)
    data = {
        "task": vars(task),
        "curves": {label: record(curve) for label, curve in curves.items()},
        "cannot_run": reasons,
        "goals": [vars(goal) for goal in found],
    }
    tables = [table(curves, reasons, task), goal_table(found)]
    suite.finish("precision", argv, options, tables, data, lambda: figure(curves, task))
    return int(any(not goal.met for goal in found))
