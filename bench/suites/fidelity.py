"""``python -m bench fidelity``: how closely each state format follows fp32 AdamW on the same gradients.

Every format steps on the gradients of the same traces, in lock-step with AdamW in float64. What is
compared is the *update* u = -(change of the parameter)/lr, without weight decay. Each format's fp32
parameters are set to zero before a step, so that the change is not rounded to the parameter's digits:

    error = |u - u_ref| / |u_ref|      Euclidean norms over all elements and steps
    blow-up: an element and step where not |u - u_ref| <= 2 + 2 |u_ref|
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from bench import report
from bench.peers import FORMATS, Betas, Format, state_bytes
from bench.suites import fidelity_report as views
from bench.suites.fidelity_report import WINDOW, Outcome, Result
from bench.traces import ADVERSARIAL, MAIN, MIN_QUANTIZED, Trace

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
MAIN_STEPS, ADVERSARIAL_STEPS, QUICK_STEPS = 1500, 400, 50
QUICK_TRACES = ("sparse rows", "mixed scales", "zero denominator")

# --- Measuring -----------------------------------------------------------------------------------------


class Reference:
    """AdamW without weight decay in float64: what every format is compared with."""

    def __init__(self, size: int, betas: Betas = BETAS, eps: float = EPS) -> None:
        self.betas, self.eps, self.steps = betas, eps, 0
        self.m = torch.zeros(size, dtype=torch.float64)
        self.v = torch.zeros_like(self.m)

    def update(self, gradient: Tensor) -> Tensor:
        """u = (m / (1-beta1^t)) / (sqrt(v / (1-beta2^t)) + eps)"""
        self.steps += 1
        beta1, beta2 = self.betas
        gradient = gradient.double()
        self.m = beta1 * self.m + (1 - beta1) * gradient
        self.v = beta2 * self.v + (1 - beta2) * gradient.square()
        root = (self.v / (1 - beta2**self.steps)).sqrt()
        return self.m / (1 - beta1**self.steps) / (root + self.eps)


class Runner:
    """One format on parameters of its own, which are zero before each step."""

    def __init__(self, format: Format, sizes: Sequence[int]) -> None:
        self.parameters = [torch.zeros(size) for size in sizes]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = format.build(self.parameters, LR, BETAS, EPS)

    def update(self, gradients: Sequence[Tensor]) -> Tensor:
        """u of all tensors, flat, float64."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.zero_()
            parameter.grad.copy_(gradient)
        self.optimizer.step()
        return torch.cat(self.parameters).double() / -LR


@dataclass
class Meter:
    """Sums over a trace of the distance between some updates and the reference's."""

    sizes: Sequence[int]
    watched: Tensor | None = None
    largest: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    blow_ups: int = 0
    squares: list[Tensor] = field(default_factory=list)
    """Each step's squared distance, by tensor."""

    def add(self, update: Tensor, reference: Tensor) -> None:
        """Take in one step."""
        watched = update if self.watched is None else update[self.watched]
        self.largest = torch.maximum(self.largest, watched.abs().max())  # NaN wins
        distance = update - reference
        self.blow_ups += int((~(distance.abs() <= 2 + 2 * reference.abs())).sum())
        self.squares.append(torch.stack([part.square().sum() for part in distance.split(list(self.sizes))]))

    def by_step(self, smallest: int = 0) -> Tensor:
        """Each step's squared distance over the tensors of at least ``smallest`` elements."""
        return torch.stack(self.squares)[:, torch.tensor(self.sizes) >= smallest].sum(1)


def compare(
    trace: Trace, formats: Sequence[Format], seed: int, steps: int, tick: Callable[[], None] = lambda: None
) -> Result:
    """Run all ``formats`` and the reference through ``trace`` in lock-step; ``tick`` after each step."""
    stream = trace.gradients(seed, steps)
    first = next(stream)
    sizes = [gradient.numel() for gradient in first]
    reference, norm = Reference(sum(sizes)), Meter(sizes, trace.watched)
    runners = {format.key: Runner(format, sizes) for format in formats}
    meters = {key: Meter(sizes, trace.watched) for key in runners}
    for gradients in itertools.chain([first], stream):
        exact = reference.update(torch.cat(gradients))
        norm.add(exact, torch.zeros_like(exact))
        for key, runner in runners.items():
            meters[key].add(runner.update(gradients), exact)
        tick()
    outcomes = {key: _outcome(meter, norm) for key, meter in meters.items()}
    return Result(trace, steps, float(norm.largest), outcomes)


def _outcome(meter: Meter, norm: Meter) -> Outcome:
    distance, size = meter.by_step(MIN_QUANTIZED), norm.by_step(MIN_QUANTIZED)
    return Outcome(
        error=math.sqrt(distance.sum() / size.sum()),
        error_all=math.sqrt(meter.by_step().sum() / norm.by_step().sum()),
        largest=float(meter.largest),
        blow_ups=meter.blow_ups / (sum(meter.sizes) * len(meter.squares)),
        rolling=(_rolling_sum(distance) / _rolling_sum(size)).sqrt().tolist(),
    )


def _rolling_sum(values: Tensor) -> Tensor:
    """The sum over every ``WINDOW`` consecutive values."""
    return values.unfold(0, min(WINDOW, len(values)), 1).sum(1)


def bytes_per_parameter(format: Format, size: int = 1 << 16) -> float:
    """Bytes of m+v a parameter, of one tensor that has taken a step."""
    runner = Runner(format, [size])
    runner.update([torch.ones(size)])
    return state_bytes(runner.optimizer) / size


# --- Running -------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line of this suite."""
    parser = argparse.ArgumentParser(prog="python -m bench fidelity", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a look in some 20 seconds: fewer steps and traces"
    )
    parser.add_argument(
        "--steps", type=int, help=f"steps of the main trace (default {MAIN_STEPS}, quick {QUICK_STEPS})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the results (default bench/results/<machine>)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run, show and save; 0 when every goal was met, else 1."""
    options = arguments().parse_args(argv)
    steps = options.steps or (QUICK_STEPS if options.quick else MAIN_STEPS)
    traces = [t for t in ADVERSARIAL if not options.quick or t.name in QUICK_TRACES]
    console = report.console()
    sizes, reasons = probe(FORMATS)
    formats = [format for format in FORMATS if format.key in sizes]

    plan = [(MAIN, steps), *((trace, min(steps, ADVERSARIAL_STEPS)) for trace in traces)]
    first, *rest = run(plan, formats, options.seed, console)
    goals = [*views.main_goals(first), *map(views.adversarial_goal, rest)]
    compressed = [format for format in formats if sizes[format.key] < 8]
    tables = [
        views.main_table(first, sizes, reasons),
        *views.adversarial_tables(rest, compressed),
        views.goal_table(goals),
    ]
    for table in tables:
        report.show(table, console)

    data: dict[str, Any] = {
        "bytes_per_parameter": sizes,
        "cannot_run": reasons,
        "goals": [asdict(goal) for goal in goals],
        "traces": {
            r.trace.name: {"steps": r.steps, "exact_largest": r.exact_largest}
            | {"formats": {key: got.summary() for key, got in r.outcomes.items()}}
            for r in [first, *rest]
        },
    }
    environment = report.environment("fidelity", argv, options.seed)
    folder = options.out or report.RESULTS / report.machine_slug()
    for file in report.save(folder, "fidelity", environment, tables, data, views.figure(first, compressed)):
        console.print(f"wrote {file}")
    return 0 if all(goal.met for goal in goals) else 1


def probe(formats: Sequence[Format]) -> tuple[dict[str, float], dict[str, str]]:
    """(bytes a parameter of the formats that run here, why the other peers do not), by key."""
    sizes, reasons = {}, {}
    for format in formats:
        try:
            sizes[format.key] = bytes_per_parameter(format)
        except Exception as error:  # a peer may fail in any way; ours may not
            if format.ours:
                raise
            reasons[format.key] = f"{type(error).__name__}: {error}".splitlines()[0]
    return sizes, reasons


def run(
    plan: Sequence[tuple[Trace, int]], formats: Sequence[Format], seed: int, console: Console
) -> list[Result]:
    """Every trace for its number of steps, with a progress bar each."""
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console) as progress:
        for trace, steps in plan:
            bar = progress.add_task(trace.name, total=steps)
            results.append(compare(trace, formats, seed, steps, lambda bar=bar: progress.advance(bar)))
    return results
