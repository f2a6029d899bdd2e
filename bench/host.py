"""``python -m bench host``: what a step costs on the host, before any GPU work.

Every optimizer steps on tensors of one element, so that what is timed is Python, dispatch and
bookkeeping. Ours takes its Triton path up to the launch itself, which is left out: there is nothing to
launch on without a GPU. torch's run whole, on the CPU, where a foreach operation over such tensors is a
loop in C++; on a GPU it launches kernels in its place.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import adamw_triton
from bench import report
from bench.report import Cell, Table, number

COUNTS = (30, 100, 300, 1000)
OURS = "adamw_triton, without its launch"
FOREACH, FUSED, LOOP = "torch foreach", "torch fused", "torch, a loop over tensors"
BUILD: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    OURS: lambda params: adamw_triton.AdamW(params),
    FOREACH: lambda params: torch.optim.AdamW(params, foreach=True),
    FUSED: lambda params: torch.optim.AdamW(params, fused=True),
    LOOP: lambda params: torch.optim.AdamW(params, foreach=False),
}


def tensors(count: int) -> list[torch.Tensor]:
    """Parameters of one element, with gradients."""
    params = [torch.ones(1, requires_grad=True) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(1)
    return params


def leave_out_the_launch() -> None:
    """CPU tensors take the Triton path, which ends where the kernel would be called."""
    os.environ["TRITON_INTERPRET"] = "1"
    from adamw_triton_kernels import launch

    launch.call = lambda *arguments: None


def seconds(optimizers: dict[str, torch.optim.Optimizer], rounds: int) -> dict[str, list[float]]:
    """Each round's time of one step, the optimizers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_ in range(-3, rounds):  # the first allocate and compile
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def tables(medians: dict[int, dict[str, float]]) -> list[Table]:
    """Microseconds, and ratios to ours."""
    columns = ["optimizer", *(f"{count} tensors" for count in medians)]
    micro: list[list[Cell | str]] = []
    ratio: list[list[Cell | str]] = []
    for name in BUILD:
        style = "bold" if name == OURS else ""
        row = [at[name] for at in medians.values()]
        ours = [at[OURS] for at in medians.values()]
        micro.append([Cell(name, style), *(Cell(number(1e6 * value), style) for value in row)])
        ratio.append([name, *(number(a / b) for a, b in zip(row, ours, strict=True))])
    about = "medians; one-element fp32 parameters on the CPU; torch's rows include the arithmetic on them"
    return [
        Table("Host time of a step, in microseconds", columns, micro, [about]),
        Table("As multiples of ours", columns, ratio),
    ]


def main(argv: Sequence[str]) -> int:
    """Measure, show and save."""
    parser = argparse.ArgumentParser(
        prog="python -m bench host", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tensors")
    parser.add_argument("--rounds", type=int, help="timed steps (default 300, quick 30)")
    parser.add_argument("--out", type=Path, help="folder of the results (default bench/results/<machine>)")
    options = parser.parse_args(argv)
    rounds = options.rounds or (30 if options.quick else 300)
    leave_out_the_launch()
    torch.set_num_threads(1)  # one-element tensors: more would only wait for each other
    medians: dict[int, dict[str, float]] = {}
    data: dict[str, Any] = {"rounds": rounds, "seconds": {}}
    for count in COUNTS[:2] if options.quick else COUNTS:
        found = seconds({name: build(tensors(count)) for name, build in BUILD.items()}, rounds)
        medians[count] = {name: statistics.median(values) for name, values in found.items()}
        data["seconds"][str(count)] = {
            name: {"median": medians[count][name], "min": min(values), "max": max(values)}
            for name, values in found.items()
        }
    console = report.console()
    shown = tables(medians)
    for table in shown:
        report.show(table, console)
    folder = options.out or report.RESULTS / report.machine_slug()
    for file in report.save(folder, "host", report.environment("host", argv, 0), shown, data):
        console.print(f"wrote {file}")
    return 0
