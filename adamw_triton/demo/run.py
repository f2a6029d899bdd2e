"""The demo: one small model, several optimizers, the same start and the same batches."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from adamw_triton.demo import OPTIMIZERS, STEPS, DemoError
from adamw_triton.demo.corpus import load_corpus, split
from adamw_triton.demo.model import ByteTransformer
from adamw_triton.demo.report import (
    check_picture,
    draw_curves,
    label,
    progress_bars,
    results_table,
    show_loss,
)
from adamw_triton.demo.training import BATCH, CONTEXT, Result, Task, count_parameters, train


def run_demo(
    steps: int = STEPS,
    seed: int = 0,
    out: str | Path = "loss.png",
    variants: Sequence[str] = OPTIMIZERS,
    device: str | torch.device | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Train once per name in `variants`, print a table on `console`, draw the curves into `out`.

    `device` defaults to the GPU where there is one. Whatever is wrong with the arguments is
    raised as a DemoError before any training.
    """
    out = Path(out)
    console = console or Console()
    check_steps(steps)
    check_seed(seed)
    check_variants(variants)
    check_picture(out)
    task = make_task(steps, seed, choose_device(device))
    console.print(describe(task), highlight=False)
    results = []
    with progress_bars(console) as progress:
        for name in variants:
            bar = progress.add_task(label(name), total=steps, loss="")
            results.append(train(task, name, partial(show_loss, progress, bar)))
    console.print(results_table(results))
    draw_curves(results, out)
    console.print(f"Loss curves: {out}", markup=False, highlight=False, soft_wrap=True)
    return results


def check_steps(steps: int) -> None:
    """Raise DemoError unless there is something to train."""
    if steps < 1:
        raise DemoError(f"steps must be at least 1, not {steps}")


def check_seed(seed: int) -> None:
    """Raise DemoError unless torch's generators take it."""
    if not -(1 << 63) <= seed < 1 << 63:
        raise DemoError(f"seed must be a whole number of 64 bits, from -2**63 to 2**63 - 1, not {seed}")


def check_variants(names: Sequence[str]) -> None:
    """Raise DemoError unless `names` are some of OPTIMIZERS."""
    for name in names:
        if name not in OPTIMIZERS:
            raise DemoError(f"unknown variant {name!r}: choose from {', '.join(OPTIMIZERS)}")
    if not names:
        raise DemoError(f"no variants to train: choose from {', '.join(OPTIMIZERS)}")


def choose_device(wanted: str | torch.device | None) -> torch.device:
    """The device `wanted`, once it has proven to work; by default the GPU, else the CPU."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        proof = torch.zeros(1, device=wanted)
        proof.item()
        return proof.device
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        raise DemoError(f"cannot use device {str(wanted)!r}: {error}") from error


def make_task(steps: int, seed: int, device: torch.device) -> Task:
    """The model as `seed` starts it, and the corpus cut in two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteTransformer(context=CONTEXT)
    text, validation = split(load_corpus())
    return Task(model, text, validation, steps, seed, device)


def describe(task: Task) -> str:
    """What is about to be trained, in lines that fit 80 columns."""
    lines = [
        f"{count_parameters(task.model):,} parameters, "
        f"{len(task.train) / 1e6:.1f} MB of Python's standard library,",
        f"{task.steps} steps of {BATCH} x {CONTEXT} bytes on {task.device}",
    ]
    if task.device.type == "cpu":
        lines.append("On a CPU the variants run in plain torch, not in their Triton kernels;")
        lines.append("paged ones walk their pages there too, to the bits of the others.")
    return "\n".join(lines)
