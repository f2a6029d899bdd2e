"""``python -m bench paged``: what it costs that state is not on the GPU.

The same step resident and paged, the pages by copy engines and read in place (zero-copy), beside the peers'
ways. Their yardstick is the link, measured as ``adamw-triton doctor`` does: host to device, device to host,
both at once. On a CPU there is no link: the page walk runs all the same, to the same bits, and copies in
memory stand for it, of which zero-copy needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from adamw_triton.memory.pinned import host_bytes
from adamw_triton.paging.device import device_for
from adamw_triton.paging.link import Link
from adamw_triton.paging.link import measure as measure_copies
from bench import suite, workloads
from bench.optimizers import OPTIMIZERS, Offloaded, Optimizer, compiled_after, ours, runnable, told
from bench.peers import Stepper, state_bytes
from bench.report import Cell, Table, number
from bench.suite import COLOURS
from bench.timing import COPIED, Spread, Timer, interleaved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGET = {"cpu": 24 << 20, "cuda": None}
"""Of the GPU, for staging; small on a CPU, so that there are several pages."""
ELEMENTS = {"quick": 1 << 22, "cpu": 1 << 24, "cuda": 1 << 28}
WARM_UP = 3


def rows(device: str) -> list[Optimizer]:
    """Ours resident, ours paged in both ways, and what peers have."""
    found = []
    for one in OPTIMIZERS:
        if one.ours and one.paged:
            variant = one.key.split()[1]
            for transfer in ("copy", "zero_copy"):
                build = ours(variant, transfer=transfer, memory_budget=BUDGET[device])
                found.append(replace(one, key=f"{one.key}, {transfer}", build=build))
        elif one.ours or one.paged:
            found.append(one)
    return found


def measure_link(device: str) -> Link:
    """Between buffers of 256 MiB, pinned on the host; on a CPU, copies within memory, one after the other."""
    there = torch.device(device)
    hosts = [host_bytes(COPIED, there).fill_(1) for _ in range(2)]
    gpus = [torch.ones(COPIED, dtype=torch.uint8, device=there) for _ in range(2)]
    return measure_copies(device_for(there), hosts, gpus)


@dataclass(frozen=True)
class Measured:
    """One row."""

    spread: Spread
    state: int
    """Bytes, which cross the link each way if the row is a paged one; of CPU offload, those of the weights,
    which do instead."""


def crossing(optimizer: Stepper) -> int:
    if isinstance(optimizer, Offloaded):
        return sum(param.nbytes for param in optimizer.params)
    return state_bytes(optimizer)


def measure(
    elements: int, dtype: torch.dtype, device: str, rounds: int, seed: int
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every row on eight tensors of the same size together."""
    found, reasons = runnable(rows(device), device, dtype)
    params = workloads.tensors([(elements // 8,)] * 8, dtype, device, seed)
    timer = Timer(device, ahead=True)
    made = {}
    for one in found:
        with told(one, reasons):
            optimizer = one.build(params, 1e-4, 0.01)
            for _ in range(WARM_UP):
                timer.wall(optimizer.step)
            made[one.key] = optimizer

    def step(optimizer: Stepper) -> Callable[[], object]:
        def run() -> None:
            optimizer.step()
            if device == "cuda":  # the last pages on their way out are part of it
                torch.cuda.synchronize()

        return run

    spreads = interleaved({key: step(one) for key, one in made.items()}, rounds, timer, seed)
    return {key: Measured(spreads[key], crossing(one)) for key, one in made.items()}, reasons


def record(got: Measured, link: Link) -> dict[str, float]:
    """For the JSON."""
    share = got.state / got.spread.median / link.both
    return {**got.spread.record(), "state_bytes": got.state, "share_of_link": share}


def table(
    measured: dict[str, Measured], reasons: dict[str, str], link: Link, device: str, about: str
) -> Table:
    """Times, ratios to the resident step of the same state, and rates."""
    lines: list[list[Cell | str]] = []
    for one in rows(device):
        got = measured.get(one.key)
        if got is None:
            lines.append([one.key, "cannot run", "", "", ""])
            continue
        resident = measured.get(f"adamw_triton {one.bits}bit", got).spread.median
        rate = got.state / got.spread.median
        spread = got.spread
        cells = [f"{number(1e3 * spread.median)} ± {number(500 * (spread.high - spread.low), 2)}"]
        cells.append(f"{spread.median / resident:.2f}")
        cells += [f"{rate / 1e9:.2f}", f"{rate / link.both:.0%}"] if one.paged else ["", ""]
        lines.append([suite.name_cell(one.key), *cells])
    kind = "the link" if device == "cuda" else "no link here, its column compares with copies in memory"
    both = "each way with both" if device == "cuda" else "each way in turn"
    rates = f"in {link.to_gpu / 1e9:.1f}, out {link.to_host / 1e9:.1f}, {both} {link.both / 1e9:.1f}"
    return Table(
        f"Paged state, {about}",
        ["optimizer", "ms a step", "of resident", "GB/s each way", "of the link"],
        lines,
        [
            f"{kind}, GB/s: {rates}",
            "bitsandbytes' managed memory stays on a GPU that has room: then nothing crosses the link",
            *suite.reason_notes(reasons),
        ],
    )


def figure(measured: dict[str, Measured], link: Link, device: str, about: str) -> Figure:
    """Bars of time; the mark on a paged one is when the link alone would be done."""
    from matplotlib.figure import Figure

    shown = [one for one in rows(device) if one.key in measured]
    drawing = Figure(figsize=(9, 1.3 + 0.42 * len(shown)), layout="constrained")
    axes = drawing.subplots()
    for place, one in enumerate(reversed(shown)):
        got = measured[one.key]
        spread = got.spread
        axes.barh(
            place,
            1e3 * spread.median,
            color=COLOURS[one.library],
            alpha=0.45 if one.paged else 0.95,
            height=0.62,
        )
        axes.plot([1e3 * spread.low, 1e3 * spread.high], [place] * 2, color="0.15", lw=1.5)
        text = f"  {number(1e3 * spread.median)} ms"
        axes.text(1e3 * spread.high, place, text, va="center", size=9)
        if one.paged:
            ideal = 1e3 * got.state / link.both
            axes.plot([ideal] * 2, [place - 0.38, place + 0.38], color="#D55E00", lw=2.2)
    axes.plot(
        [],
        [],
        color="#D55E00",
        lw=2.2,
        label="moving the state alone" if device == "cuda" else "copying the state alone",
    )
    about = f"milliseconds a step: {about}"
    suite.label_bars(axes, [one.key for one in shown], "Paged state beside resident", about, margin=0.14)
    return drawing


def main(argv: Sequence[str]) -> int:
    """Measure, show and save."""
    options = suite.parser("paged", __doc__).parse_args(argv)
    device = options.device
    elements = ELEMENTS["quick" if options.quick else device]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with compiled_after(0):
        measured, reasons = measure(elements, dtype, device, 5 if options.quick else 15, options.seed)
    link = measure_link(device)
    about = f"{elements / 1e6:.1f}e6 elements, {str(dtype).removeprefix('torch.')}"
    data: dict[str, Any] = {
        "elements": elements,
        "dtype": str(dtype),
        "link": link._asdict(),
        "cannot_run": reasons,
        "optimizers": {key: record(got, link) for key, got in measured.items()},
    }
    shown = [table(measured, reasons, link, device, about)]
    suite.finish("paged", argv, options, shown, data, lambda: figure(measured, link, device, about))
    return 0
