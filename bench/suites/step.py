"""``python -m bench step``: seconds of one optimizer step, everything already on the device.

All optimizers step on the same parameters and gradients, taking turns, beside a copy of 256 MiB. From the
bytes that an optimizer has to move (parameters and state in and out, gradients in) follows the bandwidth it
achieved, as a share of the copy's. First steps, which compile and allocate, are told apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from bench import report, suite, workloads
from bench.optimizers import CLIPPED, EXACT, RESIDENT, Optimizer, compiled_after, give_back, runnable, told
from bench.peers import state_bytes
from bench.report import Cell, Table, number
from bench.suite import COLOURS, DTYPES
from bench.timing import COPY, Spread, Timer, copy_bandwidth, copying, interleaved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = (*RESIDENT[:2], *EXACT, *RESIDENT[2:], *CLIPPED)
WARM_UP = 3
APART = 1 << 29
"""Elements from which a GPU holds the state of one optimizer at a time."""


@dataclass(frozen=True)
class Case:
    """One set of parameters, of one dtype."""

    name: str
    shapes: workloads.Shapes
    dtype: str
    rounds: int = 15
    ahead: bool = True
    """Whether the host's work is hidden behind the GPU's; of many small tensors it is what takes the time."""
    compiles: bool = True
    """Whether torchao takes part, which compiles anew for every shape, a quarter of a minute each."""


def cases(device: str, quick: bool) -> list[Case]:
    """Powers of two: torchao leaves tensors of other sizes unquantized."""
    if quick:
        return [
            Case("1e6", workloads.one(1 << 20), "fp32", 9),
            Case("1e6", workloads.one(1 << 20), "bf16", 9),
            Case("LoRA, 20 tensors", workloads.lora(20, 512), "fp32", 9),
        ]
    if device == "cpu":
        return [
            Case("1e6", workloads.one(1 << 20), "fp32", 31),
            *(Case("1.7e7", workloads.one(1 << 24), dtype) for dtype in DTYPES),
            Case("Llama, 2.6e7", workloads.llama(512, 8, 1024), "fp32"),
            Case("LoRA, 300 tensors", workloads.lora(), "fp32"),
        ]
    billion, rest = workloads.one(1 << 30), [("1e6", 1 << 20), ("1.3e8", 1 << 27)]
    return [  # the most important first: what is measured when time is over is kept
        Case("1.1e9", billion, "bf16"),
        Case("1.1e9", billion, "fp32"),
        Case("LoRA, 300 tensors", workloads.lora(), "bf16", 51, ahead=False),
        Case("Llama, 1e9", workloads.llama(2048, 18, 32768), "bf16", compiles=False),
        *(Case(name, workloads.one(size), dtype, compiles=False)
          for name, size in rest for dtype in ("bf16", "fp32")),
        Case("1.1e9", billion, "fp16", compiles=False),
    ]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One optimizer on one case."""

    spread: Spread
    first: float
    """Seconds of the first step."""
    bytes_per_element: float
    """That a step has to move."""
    bandwidth: float

    @classmethod
    def of(cls, spread: Spread, first: float, moved: int, elements: int) -> Measured:
        return cls(spread, first, moved / elements, moved / spread.median)


@dataclass(frozen=True)
class Result:
    """One case: what ran, why the others did not, and the copy beside them."""

    case: Case
    measured: dict[str, Measured]
    reasons: dict[str, str]
    copy: float
    """Bytes a second."""

    @property
    def label(self) -> str:
        return f"{self.case.name}, {self.case.dtype}"

    def ratio(self, key: str, other: str) -> float:
        """How many times longer the first takes."""
        return self.measured[key].spread.median / self.measured[other].spread.median


def measure(case: Case, optimizers: Sequence[Optimizer], device: str, seed: int) -> Result:
    """Time all of them on the same parameters: in turns, or one by one where they do not fit beside each
    other."""
    dtype, elements = DTYPES[case.dtype], workloads.numel(case.shapes)
    apply = [one for one in optimizers if not (one in EXACT and dtype == torch.float32)]
    chosen = [one for one in apply if case.compiles or one.library != "torchao"]
    found, reasons = runnable(chosen, device, dtype)
    reasons |= {one.key: "it was left out where it compiles anew" for one in apply if one not in chosen}
    params = workloads.tensors(case.shapes, dtype, device, seed)
    timer = Timer(device, ahead=case.ahead)
    measured: dict[str, Measured] = {}
    copies = []
    for group in [[one] for one in found] if device == "cuda" and elements >= APART else [found]:
        steps, first, moved = {}, {}, {}
        for optimizer in group:
            with told(optimizer, reasons):
                made = optimizer.build(params, 1e-4, 0.01)
                first[optimizer.key] = timer.wall(made.step)
                for _ in range(WARM_UP):
                    timer.wall(made.step)
                steps[optimizer.key] = made.step
                moved[optimizer.key] = 3 * elements * dtype.itemsize + 2 * state_bytes(made)
        spreads = interleaved({**steps, COPY: copying(device)}, case.rounds, timer, seed)
        copies.append(copy_bandwidth(spreads[COPY], device))
        measured |= {key: Measured.of(spreads[key], first[key], moved[key], elements) for key in steps}
        made = None
        steps.clear()
        give_back(device)
    return Result(case, measured, reasons, statistics.median(copies))


def table(results: Sequence[Result], optimizers: Sequence[Optimizer]) -> Table:
    """Medians, with half the distance of the quartiles, and the share of the copy's bandwidth."""
    rows: list[list[Cell | str]] = []
    for optimizer in optimizers:
        cells: list[Cell | str] = [suite.name_cell(optimizer.key)]
        for result in results:
            got = result.measured.get(optimizer.key)
            missing = "cannot run" if optimizer.key in result.reasons else ""
            cells.append(missing if got is None else _cell(got, result, optimizer.ours))
        firsts = [r.measured[optimizer.key].first for r in results if optimizer.key in r.measured]
        cells.append(f"{number(max(firsts))} s" if firsts else "")
        rows.append(cells)
    reasons = {key: reason for result in results for key, reason in result.reasons.items()}
    copies = ", ".join(f"{result.copy / 1e9:.1f}" for result in results)
    return Table(
        "Milliseconds a step",
        ["optimizer", *(result.label for result in results), "first step"],
        rows,
        [
            "median of interleaved rounds ± half the distance between the quartiles; in brackets the share "
            "of the copy's bandwidth",
            f"the copy beside each case, GB/s: {copies}",
            "first step: the longest of the cases; it compiles and allocates",
            "on a GPU the host is ahead of it when a step begins, as in training, but for the LoRA adapters, "
            "of which the host's work is what takes the time",
            "on a CPU, adamw_triton compiles its plain-torch update in the first step here; left alone, "
            "after 2**28 elements",
            "exact: weights of 16 bits are kept as if they were fp32; clipped: to a global norm",
            *suite.reason_notes(reasons),
        ],
    )


def _cell(got: Measured, result: Result, ours: bool) -> Cell:
    spread = got.spread
    text = f"{number(1e3 * spread.median)} ± {number(500 * (spread.high - spread.low), 2)}"
    return Cell(f"{text} ({got.bandwidth / result.copy:.0%})", "bold" if ours else "")


LARGE = 10_000_000


def goals(results: Sequence[Result]) -> Table:
    """Ours beside the peers: ratios under 1 are faster."""
    rows: list[list[Cell | str]] = []
    for result in results:
        large = workloads.numel(result.case.shapes) >= LARGE
        for ours, theirs, most in (
            ("adamw_triton 32bit", ("torch foreach", "torch fused"), 1.3),
            ("adamw_triton 8bit", ("bitsandbytes 8-bit",), 1.0),
            ("adamw_triton 8bit", ("torchao 8-bit",), 1.0),
            ("adamw_triton 8bit", ("flashoptim 8-bit",), 1.0),
            *((f"adamw_triton {bits}bit, exact", (f"adamw_triton {bits}bit",), 1.25) for bits in (32, 8)),
            ("adamw_triton 32bit, clipped", ("torch fused, clipped",), 1.3),
        ):
            there = [key for key in theirs if key in result.measured]
            if ours not in result.measured or not there:
                continue
            best = min(there, key=lambda key: result.measured[key].spread.median)
            ratio = result.ratio(ours, best)
            judged = large and (result.case.dtype == "fp32" or most != 1.3)
            verdict = Cell("met", "good") if ratio <= most else Cell("missed", "bad")
            rows.append([f"{ours} / {best}", result.label, number(ratio), f"{most:g}" if judged else "",
                         verdict if judged else ""])  # fmt: skip
    return Table(
        "Times of ours over a peer's",
        ["ours / peer", "case", "ratio", "at most", "verdict"],
        rows,
        [
            "goals are for 1e7 elements and more; torch's state has the parameter's dtype: in bf16 and fp16 "
            "it moves 14 bytes an element where ours, fp32, moves 22"
        ],
    )


def figure(results: Sequence[Result], optimizers: Sequence[Optimizer]) -> Figure:
    """Time an element on a logarithmic axis, a panel a case; the dotted line is the copy's bandwidth."""
    from matplotlib.figure import Figure

    columns = min(3, len(results))
    lines = math.ceil(len(results) / columns)
    shown = [one for one in optimizers if any(one.key in result.measured for result in results)]
    drawing = Figure(
        figsize=(1.6 + 3.7 * columns, 0.9 + lines * (0.75 + 0.3 * len(shown))), layout="constrained"
    )
    panels = drawing.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, result in zip(panels, results, strict=False):
        elements = workloads.numel(result.case.shapes)
        for place, optimizer in enumerate(reversed(shown)):
            got = result.measured.get(optimizer.key)
            if got is None:
                if optimizer.key not in result.reasons:
                    continue
                axes.text(
                    0.02,
                    place,
                    "cannot run",
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    color="0.6",
                    size=8,
                )
                continue
            scale = 1e9 / elements
            spread = got.spread
            colour = COLOURS[optimizer.library]
            axes.plot([scale * spread.min, scale * spread.max], [place] * 2, color=colour, lw=1.2, alpha=0.6)
            axes.plot(scale * spread.median, place, "o", color=colour, ms=8 if optimizer.ours else 6)
            axes.annotate(number(scale * spread.median), (scale * spread.median, place), (0, 6),
                          textcoords="offset points", ha="center", size=7, color=colour)  # fmt: skip
        axes.set_xscale("log")
        axes.margins(x=0.12, y=0.09)
        axes.set_yticks(range(len(shown)), [one.key for one in reversed(shown)])
        axes.set_title(result.label, size=10, loc="left")
        suite.axes_style(axes)
    for axes in list(panels)[len(results) :]:
        axes.set_visible(False)
    for label in drawing.axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("adamw_triton") else "normal")
    drawing.suptitle(
        "One optimizer step: nanoseconds an element (lower is better)", x=0.01, ha="left", weight="bold"
    )
    return drawing


def record(result: Result) -> dict[str, Any]:
    """For the JSON."""
    return {
        "elements": workloads.numel(result.case.shapes),
        "tensors": len(result.case.shapes),
        "copy_bytes_per_second": result.copy,
        "cannot_run": result.reasons,
        "optimizers": {
            key: {
                **got.spread.record(),
                "first_step": got.first,
                "bytes_per_element": got.bytes_per_element,
                "bytes_per_second": got.bandwidth,
                "share_of_copy": got.bandwidth / result.copy,
            }
            for key, got in result.measured.items()
        },
    }


def main(argv: Sequence[str]) -> int:
    """Measure, show and save; 0 when every goal was met, else 1."""
    options = suite.parser("step", __doc__).parse_args(argv)
    chosen = cases(options.device, options.quick)
    results: list[Result] = []
    with compiled_after(0):
        for case in track(chosen, "step", console=report.console()):
            results.append(measure(case, ROWS, options.device, options.seed))
            verdicts = goals(results)
            shown = [table(results, ROWS), verdicts]
            data = {"cases": {result.label: record(result) for result in results}}
            suite.write("step", argv, options, shown, data)
    suite.finish("step", argv, options, shown, data, lambda: figure(results, ROWS))
    return int(any(isinstance(row[-1], Cell) and row[-1].style == "bad" for row in verdicts.rows))
