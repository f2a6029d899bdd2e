"""The fidelity suite's goals, tables and plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from bench.peers import FORMATS, Format
from bench.report import Cell, Table, number
from bench.traces import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW = 25
"""Steps that the error "at" a step is taken over."""


@dataclass(frozen=True)
class Outcome:
    """How one format did on one trace."""

    error: float
    """|u - u_ref| / |u_ref| over the tensors of at least 4,096 elements, which every format quantizes."""
    error_all: float
    largest: float
    """Largest |u| of the watched elements: in learning rates."""
    blow_ups: float
    """Share of elements and steps."""
    rolling: list[float]
    """``error`` over the last ``WINDOW`` steps, at every step that has so many behind it."""

    def summary(self) -> dict[str, float]:
        """Everything but the curve."""
        return {name: value for name, value in asdict(self).items() if name != "rolling"}


@dataclass(frozen=True)
class Result:
    """Every format on one trace."""

    trace: Trace
    steps: int
    exact_largest: float
    """Of AdamW in float64."""
    outcomes: Mapping[str, Outcome]
    """By the format's key."""

    @property
    def limit(self) -> float:
        """The largest |u| that ours may have."""
        return self.trace.limit(self.exact_largest)


@dataclass(frozen=True)
class Goal:
    """Something that ours has to reach, what it reached, and whether that is enough."""

    text: str
    measured: float
    met: bool


def main_goals(result: Result) -> list[Goal]:
    """On real gradients, where a study before this code measured 0.035, and 0.146 for bitsandbytes."""
    error, peer = result.outcomes["ours 128"].error, result.outcomes.get("bnb CUDA")
    subject = f"{result.trace.name}: error of ours 128"
    goals = [Goal(f"{subject} at most 0.045", error, error <= 0.045)]
    if peer:
        half = peer.error / 2
        goals.append(Goal(f"{subject} under half of bnb CUDA's, {number(half)}", error, error < half))
    return goals


def adversarial_goal(result: Result) -> Goal:
    """No NaN, and no update above the trace's limit, in any of our formats."""
    ours = [result.outcomes[format.key].largest for format in FORMATS if format.ours]
    largest = float(torch.tensor(ours, dtype=torch.float64).max())  # NaN wins
    text = f"{result.trace.name}: largest update of ours at most {number(result.limit)}"
    return Goal(text, largest, largest <= result.limit)


def main_table(result: Result, sizes: Mapping[str, float], reasons: Mapping[str, str]) -> Table:
    """Every format on the main trace; those that cannot run say why."""
    rows: list[list[Cell | str]] = []
    for format in FORMATS:
        cells = ["cannot run", "", "", "", ""]
        if format.key in result.outcomes:
            got = result.outcomes[format.key]
            numbers = map(number, (got.error, got.error_all, got.largest))
            cells = [f"{sizes[format.key]:.3f}", *numbers, f"{got.blow_ups:.0e}"]
        rows.append([Cell(format.label, "bold" if format.ours else ""), *cells])
    return Table(
        f"{result.trace.about}, {result.steps:,} steps",
        ["format", "bytes/param", "error", "all tensors", "largest |u|", "blow-ups"],
        rows,
        [
            "bytes/param: of m and v with their scales",
            "error: |u - u_ref| / |u_ref| against AdamW in float64, on tensors of at least 4,096 elements",
            f"largest |u|: in learning rates; exact AdamW's is {number(result.exact_largest)}",
            "blow-ups: share of elements and steps with |u - u_ref| > 2 + 2|u_ref|",
            *(f"{key} cannot run: {reason}" for key, reason in reasons.items()),
        ],
    )


def adversarial_tables(results: Sequence[Result], formats: Sequence[Format]) -> list[Table]:
    """Errors, and largest updates, by trace (rows) and format (columns)."""
    keys = [format.key for format in formats]
    errors: list[list[Cell | str]] = []
    largest: list[list[Cell | str]] = []
    for result in results:
        got = [result.outcomes[key] for key in keys]
        errors.append([result.trace.name, *(_cell(one.error, 1.0) for one in got)])
        limits = [number(result.exact_largest), number(result.limit)]
        largest.append([result.trace.name, *limits, *(_cell(one.largest, result.limit) for one in got)])
    title = f"Adversarial gradients, {results[0].steps:,} steps of 65,536 elements"
    about = [f"{result.trace.name}: {result.trace.about}" for result in results]
    limits = "limit: of ours; twice the exact one's, 7 times with mixed scales, 1 with a zero denominator"
    columns = ["trace", "exact", "limit", *keys]
    return [
        Table(f"{title}: error", ["trace", *keys], errors, about),
        Table(f"{title}: largest |u| in learning rates", columns, largest, [limits]),
    ]


def _cell(value: float, limit: float) -> Cell:
    return Cell(number(value), "" if value <= limit else "bad")


def goal_table(goals: Sequence[Goal]) -> Table:
    """The verdict."""
    verdicts = {True: Cell("met", "good"), False: Cell("missed", "bad")}
    rows = [[goal.text, number(goal.measured), verdicts[goal.met]] for goal in goals]
    return Table("Goals", ["goal", "measured", "verdict"], rows)


def figure(result: Result, formats: Sequence[Format]) -> Figure:
    """``rolling``, by step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    drawing = Figure(figsize=(10, 5.6), layout="constrained")
    axes = drawing.subplots()
    # From the lowest end to the highest. Every second peer is dashed: some lie on each other.
    ordered = sorted(formats, key=lambda format: result.outcomes[format.key].rolling[-1])
    peer_styles = itertools.cycle(["-", (0, (4, 3))])
    ends = []
    for format in ordered:
        rolling = result.outcomes[format.key].rolling
        steps = range(result.steps - len(rolling) + 1, result.steps + 1)
        style = {"ls": "-", "lw": 2.8} if format.ours else {"ls": next(peer_styles), "lw": 1.4}
        (line,) = axes.semilogy(steps, rolling, **style)
        ends.append((format, rolling[-1], line.get_color()))
    low, high = axes.get_ylim()
    gap = (high / low) ** (1 / 22)  # the height of a line of text, on the axis' scale
    at = 0.0
    for format, end, color in ends:
        at = max(end, gap * at)
        weight = "bold" if format.ours else "normal"
        place = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(1.01, at, format.label, color=color, weight=weight, **place)
    title = "How far AdamW in 8 bits strays from exact AdamW on the same gradients"
    axes.set_title(title, loc="left", weight="bold")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"training step of a {result.trace.name}")
    axes.set_ylabel(f"relative error of the update, over {WINDOW} steps")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing
