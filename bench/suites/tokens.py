"""``python -m bench tokens``: what an optimizer adds to a training step, by the tokens of that step.

Paged state costs the same seconds whatever the step is about; with more tokens they count for less, and with
gradient release they pass while backward runs. A Llama of a billion parameters and one of three are trained
with each optimizer in turn; what their steps take beyond the same forwards and backwards without any
optimizer is its part.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from bench import report, suite
from bench.optimizers import (
    OPTIMIZERS,
    RELEASED,
    Optimizer,
    compiled_after,
    give_back,
    runnable,
    told,
    without_compiling,
)
from bench.report import Cell, Table, number
from bench.suite import COLOURS
from bench.timing import Spread
from bench.workloads import Llama

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDS = 4
TRIED = 5
"""Steps before the first that counts: of ours, some try both ways over the link."""
_KEYS = (
    "adamw_triton paged_8bit", "adamw_triton 32bit", "torchao CPU offload", "bitsandbytes paged 8-bit",
    "adamw_triton paged_32bit", "torch fused", "adamw_triton 8bit", "bitsandbytes paged 32-bit",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A model, and steps of so many tokens."""

    name: str
    llama: Llama
    tokens: tuple[int, ...]
    most: int
    """Tokens of a forward; more of them are several, whose gradients are added up."""
    optimizers: tuple[str, ...] = _KEYS


def tasks(device: str, quick: bool) -> list[Task]:
    if quick or device == "cpu":
        return [Task("tiny", Llama(64, 2, batch=1, context=32), (32, 128), 64, _KEYS[:2])]
    one = Llama(2048, 20, batch=1, context=2048, dtype=torch.bfloat16)
    three = replace(one, width=3072, depth=28)
    return [
        Task("1B", one, (2048, 8192, 32768), 8192),
        Task("3B", three, (2048, 8192), 8192, (*_KEYS[:1], *_KEYS[2:4])),
    ]


class Loop:
    """One optimizer's training, or none's."""

    def __init__(self, task: Task, optimizer: Optimizer | None, device: str, seed: int) -> None:
        self.task, self.device, self.seed = task, device, seed
        self.model = task.llama.model(device, seed)
        self.params = list(self.model.parameters())
        self.optimizer = None if optimizer is None else optimizer.build(self.params, 1e-4, 0.01)

    def batches(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Of one step."""
        at_once = min(tokens, self.task.most)
        endless = replace(self.task.llama, batch=at_once // self.task.llama.context).batches(
            self.device, self.seed
        )
        return list(itertools.islice(endless, tokens // at_once))

    def step(self, given: list[tuple[Tensor, Tensor]]) -> float:
        """Its seconds."""
        start = self._now()
        for place, batch in enumerate(given):
            adds = getattr(self.optimizer, "accumulating", None) if place < len(given) - 1 else None
            with contextlib.nullcontext() if adds is None else adds():
                torch.autograd.backward(self.task.llama.loss(self.model, batch))
        if self.optimizer is not None:
            self.optimizer.step()
        for param in self.params:
            param.grad = None
        return self._now() - start

    def measure(self, rounds: int) -> dict[int, Spread]:
        found = {}
        for tokens in self.task.tokens:
            given = self.batches(tokens)
            for _ in range(1 if found else TRIED):
                self.step(given)
            found[tokens] = Spread.of([self.step(given) for _ in range(rounds)])
        return found

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class Result:
    """One model: seconds by tokens, of each optimizer."""

    task: Task
    alone: dict[int, Spread]
    """Forward and backward."""
    measured: dict[str, dict[int, Spread]]
    reasons: dict[str, str]

    def added(self, key: str, tokens: int) -> float:
        """As a share of forward and backward."""
        return self.measured[key][tokens].median / self.alone[tokens].median - 1

    def record(self) -> dict[str, Any]:
        return {
            "alone": {str(tokens): spread.record() for tokens, spread in self.alone.items()},
            "cannot_run": self.reasons,
            "optimizers": {
                key: {
                    str(tokens): {**spread.record(), "added": self.added(key, tokens)}
                    for tokens, spread in of.items()
                }
                for key, of in self.measured.items()
            },
        }


def measure(result: Result, optimizers: Sequence[Optimizer], device: str, seed: int, end: float) -> None:
    """Each by itself, as long as there is time."""
    for one in track(optimizers, f"tokens, {result.task.name}", console=report.console()):
        if time.monotonic() > end:
            result.reasons[one.key] = "no time was left"
            continue
        with told(one, result.reasons):
            result.measured[one.key] = Loop(result.task, one, device, seed).measure(ROUNDS)
        give_back(device)


def table(result: Result) -> Table:
    columns = ["optimizer", *(f"{tokens:,} tokens" for tokens in result.task.tokens)]
    alone = [f"{number(1e3 * result.alone[tokens].median)} ms" for tokens in result.task.tokens]
    rows: list[list[Cell | str]] = [["forward and backward alone", *alone]]
    for key, of in result.measured.items():
        cells = [
            f"{number(1e3 * spread.median)} ms, {result.added(key, tokens):+.1%}"
            for tokens, spread in of.items()
        ]
        rows.append([suite.name_cell(key), *cells])
    notes = [
        "medians; in per cent: what the optimizer adds to forward and backward",
        f"a Llama of {result.task.name} in bf16, sequences of {result.task.llama.context} bytes, at most "
        f"{result.task.most} tokens at a time",
        "bitsandbytes' managed memory stays on a GPU that has room: then nothing crosses the link",
        *suite.reason_notes(result.reasons),
    ]
    return Table(f"What a step takes: {result.task.name}", columns, rows, notes)


def figure(results: Sequence[Result]) -> Figure:
    """What is added against tokens, on logarithmic axes, a panel a model."""
    from matplotlib.figure import Figure

    library = {one.key: one.library for one in (*OPTIMIZERS, *RELEASED)}
    drawing = Figure(figsize=(6 * len(results), 4.4), layout="constrained")
    for axes, result in zip(drawing.subplots(1, len(results), squeeze=False).flat, results, strict=True):
        for key in result.measured:
            added = [max(1e-4, result.added(key, tokens)) for tokens in result.task.tokens]
            ours = library[key] == "adamw-triton"
            axes.plot(
                result.task.tokens, [100 * share for share in added], marker="o", color=COLOURS[library[key]],
                lw=2.2 if ours else 1.2, ls="-" if "released" in key or not ours else "--", label=key,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="tokens a step", ylabel="per cent of it")
        axes.set_title(result.task.name, size=10, loc="left")
        axes.legend(frameon=False, fontsize=7)
        suite.axes_style(axes)
    drawing.suptitle("What an optimizer adds to forward and backward", x=0.01, ha="left", weight="bold")
    return drawing


def main(argv: Sequence[str]) -> int:
    """Train, show and save."""
    parser = suite.parser("tokens", __doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for all of them (default 600)")
    options = parser.parse_args(argv)
    end = time.monotonic() + options.seconds
    results: list[Result] = []
    with compiled_after(0):
        for task in tasks(options.device, options.quick):
            chosen = [one for key in task.optimizers for one in OPTIMIZERS if one.key == key]
            chosen[1:1] = RELEASED
            found, reasons = runnable(chosen, options.device, task.llama.dtype)
            alone = Loop(task, None, options.device, options.seed).measure(ROUNDS)
            give_back(options.device)
            results.append(Result(task, alone, {}, reasons))
            measure(results[-1], list(map(without_compiling, found)), options.device, options.seed, end)
            data = {"models": {result.task.name: result.record() for result in results}}
            suite.write("tokens", argv, options, list(map(table, results)), data)
    suite.finish("tokens", argv, options, list(map(table, results)), data, lambda: figure(results))
    return 0
