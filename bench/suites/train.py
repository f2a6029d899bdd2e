"""``python -m bench train``: a Llama of transformers trained on real text with every optimizer.

The same weights, the same batches; the optimizers take turns, on a GPU ours and torch's, and the peers one by
one. Measured are the loss at every step, the time of a step and the optimizer's share of it, and the peak of
memory on a GPU.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from bench import report, suite
from bench.optimizers import (
    OPTIMIZERS,
    Optimizer,
    compiled_after,
    give_back,
    runnable,
    told,
    without_compiling,
)
from bench.peers import state_bytes
from bench.report import Cell, Table, number
from bench.suite import COLOURS
from bench.timing import Spread
from bench.workloads import Llama

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BESIDE = "torch fused"
"""It takes turns with ours on a GPU, whose memory does not hold all at once."""
LR, DECAY = 1e-3, 0.01
SMOOTHED = 5
WARM_UP = 5
"""Steps that are not counted: ours tries both ways of paging in the first four."""


@dataclass(frozen=True)
class Task:
    """What every optimizer is given alike."""

    llama: Llama
    steps: int
    device: str
    seed: int
    accumulation: int = 1
    """Batches whose gradients are added up for a step."""
    peers_steps: int | None = None
    """Fewer, where a step takes long."""


def task(device: str, quick: bool, seed: int) -> Task:
    """From half a million parameters to a billion."""
    if quick:
        return Task(Llama(128, 2, batch=4, context=64), 20, device, seed)
    if device == "cpu":
        return Task(Llama(768, 12, batch=2, context=64), 10, device, seed)
    llama = Llama(2048, 20, batch=4, context=2048, dtype=torch.bfloat16)
    return Task(llama, 12, device, seed, accumulation=4, peers_steps=6)


@dataclass(frozen=True)
class Run:
    """One optimizer's training."""

    losses: list[float]
    whole: Spread
    """Seconds of a step, forward and backward included."""
    optimizer: Spread
    """Seconds of the optimizer's step."""
    first: float
    """Seconds of the optimizer's first step."""
    peak: int | None
    """Bytes on the GPU."""
    state: int
    parameters: int


class Training:
    """One optimizer's training, step by step."""

    def __init__(self, task: Task, optimizer: Optimizer) -> None:
        self.task = task
        self.on_gpu = task.device == "cuda"
        self.held = self.peak = 0
        before = torch.cuda.memory_allocated() if self.on_gpu else 0
        self.model = task.llama.model(task.device, task.seed)
        self.params = list(self.model.parameters())
        self.optimizer = optimizer.build(self.params, LR, DECAY)
        self.batches = task.llama.batches(task.device, task.seed)
        self.losses: list[float] = []
        self.whole: list[float] = []
        self.own: list[float] = []
        if self.on_gpu:
            self.held = torch.cuda.memory_allocated() - before

    def step(self) -> None:
        """One step, and its peak of memory, without what the others hold that take turns with it."""
        if not self.on_gpu:
            return self.timed()
        others = torch.cuda.memory_allocated() - self.held
        torch.cuda.reset_peak_memory_stats()
        self.timed()
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        self.held = torch.cuda.memory_allocated() - others

    def timed(self) -> None:
        """Forward and backward of each batch, the optimizer."""
        start = _now(self.on_gpu)
        losses = []
        for _ in range(self.task.accumulation):
            loss = self.task.llama.loss(self.model, next(self.batches)) / self.task.accumulation
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        before = _now(self.on_gpu)
        self.optimizer.step()
        self.own.append(_now(self.on_gpu) - before)
        for param in self.params:
            param.grad = None
        self.whole.append(_now(self.on_gpu) - start)
        self.losses.append(float(sum(losses)))

    def run(self) -> Run:
        """What came of it. The first steps allocate and compile: times are of those behind them."""
        warm = min(WARM_UP, len(self.own) // 2)
        return Run(
            self.losses,
            Spread.of(self.whole[warm:]),
            Spread.of(self.own[warm:]),
            self.own[0],
            self.peak if self.on_gpu else None,
            state_bytes(self.optimizer),
            sum(param.numel() for param in self.params),
        )


def in_turns(task: Task, optimizers: Sequence[Optimizer], reasons: dict[str, str]) -> dict[str, Run]:
    """All at once, a step of each in a round, in an order drawn anew: whatever disturbs the machine for a
    while disturbs them all. It takes the memory of all models."""
    trainings: dict[Optimizer, Training] = {}
    for one in optimizers:
        with told(one, reasons):
            trainings[one] = Training(task, one)
    shuffle = random.Random(task.seed).shuffle
    for _ in track(range(task.steps), "train", console=report.console()):
        order = [one for one in trainings if one.key not in reasons]
        shuffle(order)
        for one in order:
            with told(one, reasons):
                trainings[one].step()
    return {one.key: training.run() for one, training in trainings.items() if one.key not in reasons}


def one_by_one(task: Task, optimizers: Sequence[Optimizer], reasons: dict[str, str]) -> dict[str, Run]:
    """On a GPU, of which each takes most."""
    runs = {}
    for one in track(optimizers, "train, one by one", console=report.console()):
        with told(one, reasons):
            training = Training(task, one)
            for _ in range(task.peers_steps or task.steps):
                training.step()
            runs[one.key] = training.run()
        training = None
        give_back(task.device)
    return runs


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over the last ``SMOOTHED`` losses."""
    return [statistics.fmean(losses[max(0, end - SMOOTHED) : end]) for end in range(1, len(losses) + 1)]


def spread(seconds: Spread) -> str:
    return f"{number(seconds.median)} ± {number((seconds.high - seconds.low) / 2, 2)}"


def about(task: Task, runs: dict[str, Run]) -> str:
    size = next(iter(runs.values())).parameters
    shape = f"{task.llama.width} wide, {task.llama.depth} layers, {size / 1e6:.1f}M parameters"
    batches = f"{task.accumulation} x " if task.accumulation > 1 else ""
    return f"a Llama {shape}, {task.steps} steps of {batches}{task.llama.batch} x {task.llama.context} bytes"


def table(task: Task, runs: dict[str, Run], reasons: dict[str, str]) -> Table:
    columns = ["optimizer", "last loss", "s a step", "of it optimizer, s", "first step", "state B/param"]
    columns += ["peak GPU"] if task.device == "cuda" else []
    rows: list[list[Cell | str]] = []
    common = min(len(run.losses) for run in runs.values())
    for one in OPTIMIZERS:
        run = runs.get(one.key)
        if run is None:
            rows.append([one.key, "cannot run", *[""] * (len(columns) - 2)])
            continue
        cells = [f"{smoothed(run.losses[:common])[-1]:.4f}", spread(run.whole)]
        cells += [
            spread(run.optimizer),
            f"{number(run.first)} s",
            f"{run.state / run.parameters:.3f}",
        ]
        cells += [f"{run.peak / 2**30:.2f} GiB"] if run.peak is not None else []
        rows.append([suite.name_cell(one.key), *cells])
    notes = [
        f"last loss: nats a byte, mean of the last {SMOOTHED} of {common} steps; times: medians ± half the "
        "distance between the quartiles; torchao uncompiled",
        *suite.reason_notes(reasons),
    ]
    return Table(f"Training {about(task, runs)}", columns, rows, notes)


def figure(task: Task, runs: dict[str, Run]) -> Figure:
    """Loss curves, their distance from the first of torch's, and the optimizers' times."""
    from matplotlib.figure import Figure

    library = {one.key: one for one in OPTIMIZERS}
    drawing = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = drawing.subfigures(1, 2, width_ratios=(1.25, 1))
    curves, distances = left.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    base = smoothed(runs["torch fused"].losses) if "torch fused" in runs else None
    for key, run in runs.items():
        one = library[key]
        style = {"color": COLOURS[one.library], "ls": "--" if one.paged else "-" if one.bits == 32 else "-."}
        style |= {"lw": 2.4 if one.ours else 1.2}
        curve = smoothed(run.losses)
        curves.plot(range(1, len(curve) + 1), curve, label=key, **style)
        if base:
            distances.plot(
                range(1, min(len(curve), len(base)) + 1),
                [a - b for a, b in zip(curve, base, strict=False)],
                **style,
            )
    curves.set_ylabel("loss, nats a byte")
    curves.legend(frameon=False, fontsize=8, ncols=2)
    distances.set(xlabel="step", ylabel="less torch fused's")
    times = right.subplots()
    keys = list(reversed(runs))
    for place, key in enumerate(keys):
        one, spread = library[key], runs[key].optimizer
        times.barh(
            place,
            1e3 * spread.median,
            color=COLOURS[one.library],
            height=0.62,
            alpha=0.55 if one.paged else 1,
        )
        times.text(1e3 * spread.median, place, f"  {number(1e3 * spread.median)}", va="center", size=9)
    times.set_yticks(range(len(keys)), keys)
    times.set_xlabel("milliseconds of the optimizer in a step")
    times.margins(x=0.15)
    for axes in (curves, distances, times):
        suite.axes_style(axes)
    drawing.suptitle(f"Training {about(task, runs)}", x=0.01, ha="left", weight="bold")
    return drawing


def main(argv: Sequence[str]) -> int:
    """Train, show and save."""
    options = suite.parser("train", __doc__).parse_args(argv)
    given = task(options.device, options.quick, options.seed)
    found, reasons = runnable(OPTIMIZERS, options.device, given.llama.dtype)
    trained = [without_compiling(one) for one in found]
    ours = [one for one in trained if options.device == "cpu" or one.ours or one.key == BESIDE]
    peers = [one for one in trained if one not in ours]

    def data(runs: dict[str, Run]) -> dict[str, Any]:
        told = {key: asdict(run) for key, run in runs.items()}
        return {"task": about(given, runs), "cannot_run": reasons, "optimizers": told}

    with contextlib.nullcontext() if options.quick else compiled_after(0):
        runs = in_turns(given, ours, reasons)
        give_back(options.device)
        suite.write("train", argv, options, [table(given, runs, reasons)], data(runs))
        runs |= one_by_one(given, peers, reasons)
    shown = [table(given, runs, reasons)]
    suite.finish("train", argv, options, shown, data(runs), lambda: figure(given, runs))
    return 0
