"""``python -m bench released``: gradients and state that are there at one time, while a small Llama trains.

Counted by a hook on every parameter, before an optimizer's own: what gradients there are whenever one has
become final, and the state by place. Beside the peers whose optimizers also step during backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.progress import track
from torch import nn

from bench import report, suite
from bench.optimizers import BETAS, EPS, NEVER, OPTIMIZERS, Build, compiled_after, give_back, ours
from bench.peers import Stepper
from bench.report import Cell, Table, number
from bench.workloads import Llama

LR, DECAY = 1e-3, 0.01
MIB = 1 << 20
Prepare = Callable[[nn.Module], tuple[Stepper, Callable[[], object]]]
"""An optimizer of a model, and what ends a step behind backward."""


def _stepped(build: Build) -> Prepare:
    """Behind backward, as a whole or what is left of it."""

    def prepare(model: nn.Module) -> tuple[Stepper, Callable[[], object]]:
        made = build(list(model.parameters()), LR, DECAY)
        return made, made.step

    return prepare


def _optimi(released: bool) -> Prepare:
    def prepare(model: nn.Module) -> tuple[Stepper, Callable[[], object]]:
        import optimi

        how = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
        made = optimi.AdamW(model.parameters(), gradient_release=released, **how)
        if released:
            optimi.prepare_for_gradient_release(model, made, ignore_existing_hooks=True)
        return made, (lambda: None) if released else made.step

    return prepare


def _flashoptim(released: bool) -> Prepare:
    def prepare(model: nn.Module) -> tuple[Stepper, Callable[[], object]]:
        import flashoptim

        made = flashoptim.FlashAdamW(
            model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, master_weight_bits=None
        )
        if released:
            flashoptim.enable_gradient_release(model, made)
        return made, (lambda: None) if released else made.step

    return prepare


KEYS = ("adamw_triton 32bit", "torch fused")
ROWS: dict[str, Prepare] = {
    **{one.key: _stepped(one.build) for one in OPTIMIZERS if one.key in KEYS},
    "adamw_triton 32bit, released": _stepped(ours("32bit", gradient_release=True)),
    "adamw_triton 8bit, released": _stepped(ours("8bit", gradient_release=True)),
    "adamw_triton paged_8bit, released": _stepped(ours("paged_8bit", gradient_release=True)),
    "optimi": _optimi(released=False),
    "optimi, released": _optimi(released=True),
    "flashoptim 8-bit": _flashoptim(released=False),
    "flashoptim 8-bit, released": _flashoptim(released=True),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    gradients: int
    """Bytes, at most at one time."""
    after: int
    """Bytes of them behind the step."""
    state: int
    """Bytes, wherever they are."""
    seconds: float
    losses: list[float]


def train(prepare: Prepare, llama: Llama, steps: int, device: str, seed: int) -> Run:
    """The same weights and batches for each."""
    model = llama.model(device, seed)
    params = list(model.parameters())
    most = 0

    def count(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, live())

    def live() -> int:
        return sum(param.grad.nbytes for param in params if param.grad is not None)

    for param in params:
        param.register_post_accumulate_grad_hook(count)
    optimizer, step = prepare(model)
    batches = llama.batches(device, seed)
    times, losses, after = [], [], 0
    for _ in range(steps):
        start = time.perf_counter()
        loss = llama.loss(model, next(batches))
        torch.autograd.backward(loss)
        step()
        after = max(after, live())
        for param in params:
            param.grad = None
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - start)
    state = sum(
        value.nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    return Run(most, after, state, statistics.median(times[len(times) // 2 :]), losses)


def table(runs: dict[str, Run], reasons: dict[str, str], parameters: int, steps: int) -> Table:
    rows: list[list[Cell | str]] = []
    for key, run in runs.items():
        cells = [f"{nbytes / MIB:,.1f} MiB" for nbytes in (run.gradients, run.after, run.state)]
        cells += [f"{(run.gradients + run.state) / parameters:.2f}", f"{number(run.seconds)} s"]
        rows.append([suite.name_cell(key), *cells, f"{run.losses[-1]:.4f}"])
    columns = [
        "optimizer",
        "gradients at most",
        "after the step",
        "state",
        "B/parameter",
        "a step",
        "last loss",
    ]
    notes = [
        f"{parameters / 1e6:.1f}M parameters, {steps} steps; gradients whenever one has become final; "
        "of state wherever it is; both together a parameter",
        "ours uses gradients up by buckets of 64 MiB, a launch each; the peers tensor by tensor",
        *suite.reason_notes(reasons),
    ]
    return Table("Gradients and state while a Llama trains", columns, rows, notes)


def main(argv: Sequence[str]) -> int:
    """Train, show and save."""
    options = suite.parser("released", __doc__).parse_args(argv)
    steps = 6
    llama = Llama(128, 2, batch=4, context=64) if options.quick else Llama(768, 12, batch=2, context=64)
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    with compiled_after(NEVER):
        for key, prepare in track(ROWS.items(), "released", console=report.console()):
            try:
                runs[key] = train(prepare, llama, steps, options.device, options.seed)
            except Exception as error:  # a peer that is not here, or not for this device
                reasons[key] = f"{type(error).__name__}: {error}".splitlines()[0][:150]
            give_back(options.device)
    parameters = sum(param.numel() for param in llama.model("meta", 0).parameters())
    data = {
        "parameters": parameters,
        "cannot_run": reasons,
        "optimizers": {key: asdict(run) for key, run in runs.items()},
    }
    suite.finish("released", argv, options, [table(runs, reasons, parameters, steps)], data)
    return 0
