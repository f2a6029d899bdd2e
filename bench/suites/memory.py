"""``python -m bench memory``: the peak of memory that an optimizer takes, by place, beside the prediction.

Predicted by ``placement.place``, from sizes alone: state on the GPU with its staging buffers, and state on
the host. Measured over two steps, the first of which allocates: on a GPU by torch's allocator, on the host
by the kernel, which keeps the peak of resident pages. Temporaries are in what is measured alone.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import suite, workloads
from bench.optimizers import (
    NEVER,
    OPTIMIZERS,
    Optimizer,
    compiled_after,
    give_back,
    runnable,
    told,
    without_compiling,
)
from bench.report import Cell, Table
from bench.suite import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 1 << 20
ELEMENTS = {"quick": 1 << 22, "cpu": 1 << 25, "cuda": 1 << 29}
_MMAP_THRESHOLD = -3  # of mallopt


@dataclass(frozen=True)
class Bytes:
    """By place."""

    gpu: int
    host: int


def predicted(optimizer: Optimizer, sizes: Sequence[int], device: str) -> Bytes | None:
    """Of ours, what ``place`` says; a CPU's memory has the staging buffers too."""
    if not optimizer.ours:
        return None
    from adamw_triton.state.formats import format_for
    from adamw_triton.state.placement import place

    formats = [format_for(size, optimizer.bits) for size in sizes]
    placed = place(list(zip(formats, sizes, strict=True)), optimizer.paged)
    if device == "cpu":
        return Bytes(0, placed.gpu_bytes + placed.host_bytes)
    return Bytes(placed.gpu_bytes, placed.host_bytes)


def measured(optimizer: Optimizer, shapes: workloads.Shapes, device: str, seed: int) -> Bytes:
    """Peaks of two steps above what parameters and gradients take."""
    params = workloads.tensors(shapes, torch.float32, device, seed)
    made = optimizer.build(params, 1e-4, 0.01)
    gc.collect()
    before = _host("VmRSS", reset=True)
    held = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    made.step()
    made.step()
    gpu = torch.cuda.max_memory_allocated() - held if device == "cuda" else 0
    return Bytes(gpu, _host("VmHWM") - before)


def _host(line: str, *, reset: bool = False) -> int:
    """Bytes of the process that the kernel counts: resident now, or their peak since the reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{line}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def give_freed_memory_back() -> None:
    """Every large block its own mapping, unmapped when freed: else what one optimizer frees, the next
    takes without the kernel's seeing it."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)


def record(results: dict[str, tuple[Bytes, Bytes | None]]) -> dict[str, Any]:
    """For the JSON."""
    return {
        key: {"measured": vars(got), "predicted": wanted and vars(wanted)}
        for key, (got, wanted) in results.items()
    }


def table(
    results: dict[str, tuple[Bytes, Bytes | None]], reasons: dict[str, str], elements: int, device: str
) -> Table:
    """Bytes an element by place, and how far the prediction is off."""
    places = ["host"] if device == "cpu" else ["gpu", "host"]
    columns = ["optimizer"]
    for place in places:
        columns += [f"{place}: measured", "predicted", "difference"]
    rows: list[list[Cell | str]] = []
    for one in OPTIMIZERS:
        if one.key not in results:
            rows.append([one.key, "cannot run", *[""] * (len(columns) - 2)])
            continue
        got, wanted = results[one.key]
        cells = []
        for place in places:
            has = getattr(got, place)
            cells.append(f"{has / MIB:,.0f} MiB, {has / elements:.2f} B")
            if wanted is None:
                cells += ["", ""]
                continue
            should = getattr(wanted, place)
            cells += [f"{should / MIB:,.0f} MiB", f"{(has - should) / MIB:+,.1f} MiB"]
        rows.append([suite.name_cell(one.key), *cells])
    notes = [
        f"{elements:,} fp32 parameters, which with their gradients are not counted; B: bytes a parameter",
        "measured: the peak of two steps, their temporaries included, torchao uncompiled; on the host, "
        "what was touched: staging buffers may not be, to their end",
        "predicted: state and staging",
        *suite.reason_notes(reasons),
    ]
    return Table("Peak memory of an optimizer", columns, rows, notes)


def figure(results: dict[str, tuple[Bytes, Bytes | None]], elements: int, device: str) -> Figure:
    """Bars of what was measured, by place; marks of what was predicted."""
    from matplotlib.figure import Figure

    shown = [one for one in OPTIMIZERS if one.key in results]
    drawing = Figure(figsize=(9, 1.3 + 0.42 * len(shown)), layout="constrained")
    axes = drawing.subplots()
    for place, one in enumerate(reversed(shown)):
        got, wanted = results[one.key]
        colour = COLOURS[one.library]
        pale = 1.0 if device == "cpu" else 0.5
        gpu, host = got.gpu / elements, got.host / elements
        axes.barh(place, gpu, color=colour, height=0.6)
        axes.barh(place, host, left=gpu, color=colour, height=0.6, alpha=pale)
        axes.text(gpu + host, place, f"  {gpu + host:.2f}", va="center", size=9)
        if wanted is not None:
            ends = {wanted.gpu / elements, (wanted.gpu + wanted.host) / elements} - {0.0}
            for end in ends:
                axes.plot([end] * 2, [place - 0.38, place + 0.38], color="black", lw=2)
    axes.plot([], [], color="black", lw=2, label="predicted from sizes alone")
    where = "host memory" if device == "cpu" else "GPU memory (full) and host memory (pale)"
    about = f"peak bytes of {where} a parameter, beyond parameters and gradients"
    suite.label_bars(axes, [one.key for one in shown], "Memory of a step", about, margin=0.1)
    return drawing


def main(argv: Sequence[str]) -> int:
    """Measure, show and save."""
    options = suite.parser("memory", __doc__).parse_args(argv)
    device = options.device
    elements = ELEMENTS["quick" if options.quick else device]
    shapes = [(elements // 16,)] * 16
    found, reasons = runnable(OPTIMIZERS, device)
    give_freed_memory_back()
    # Not compiled, or whichever is measured then would have the compiler's own memory on its account.
    results: dict[str, tuple[Bytes, Bytes | None]] = {}
    with compiled_after(NEVER):
        for one in found:
            with told(one, reasons):
                got = measured(without_compiling(one), shapes, device, options.seed)
                results[one.key] = got, predicted(one, [elements // 16] * 16, device)
            give_back(device)
            data = {"elements": elements, "cannot_run": reasons, "optimizers": record(results)}
            if one.ours:  # kept, whatever becomes of the peers
                suite.write("memory", argv, options, [], data)
    shown = [table(results, reasons, elements, device)]
    suite.finish("memory", argv, options, shown, data, lambda: figure(results, elements, device))
    return 0
