"""``python -m bench roofline``: projected, not measured: how fast the compiled kernels could be at best.

A step takes at least as long as its bytes over the memory's bandwidth, and at least as long as its
instructions over the rate at which a GPU issues them. Both are counted in the machine code (``bench
audit``); overlap is taken to be perfect. Real steps are slower.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import report, suite
from bench.report import Cell, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUDIT = report.RESULTS / "aot" / "audit.json"
PAIR = ("bf16", "bf16")


@dataclass(frozen=True)
class Gpu:
    """What a projection needs of a GPU."""

    name: str
    target: str
    bandwidth: float
    """Bytes a second that streaming kernels achieve."""
    units: int
    """Multiprocessors or compute units."""
    lanes: int
    """Lane-instructions that one of them issues a clock."""
    clock: float
    """Hz, boosted."""
    source: str

    @property
    def issue(self) -> float:
        """Lane-instructions a second."""
        return self.units * self.lanes * self.clock


# Clocks and units from the makers' data sheets; 4 schedulers of 32 lanes, or 4 SIMDs of 16. T4: turing issues
# 4 warps a clock, though its fp32 units take two clocks for each.
GPUS = (
    Gpu("T4", "sm_75", 0.25e12, 40, 128, 1.59e9, "78% of 320 GB/s, assumed"),
    Gpu("A100 80 GB", "sm_80", 1.76e12, 108, 128, 1.41e9, "measured by RRZE gpu-benches"),
    Gpu("RTX 4090", "sm_89", 0.92e12, 128, 128, 2.52e9, "measured in tinygrad #6, clpeak #106"),
    Gpu("H100 SXM", "sm_90", 3.0e12, 132, 128, 1.98e9, "measured in cuda-samples #392"),
    Gpu("H200", "sm_90", 4.3e12, 132, 128, 1.98e9, "90% of 4.8 TB/s, assumed"),
    Gpu("MI300X", "gfx942", 4.03e12, 304, 64, 2.1e9, "measured by RRZE gpu-benches"),
)
KERNELS = {
    "32bit": "adamw_triton 32bit",
    "8bit block 128": "adamw_triton 8bit",
    "flashoptim 8bit": "flashoptim 8-bit",
    "flashoptim 8bit corrected": "flashoptim 8-bit, corrected weights",
}


@dataclass(frozen=True)
class Projection:
    """Of one kernel on one GPU, in seconds for 1e9 parameters."""

    memory: float
    issue: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue)

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.issue else "issue"


def project(gpu: Gpu, instructions: float, moved: float) -> Projection:
    """From instructions and bytes an element."""
    return Projection(1e9 * moved / gpu.bandwidth, 1e9 * instructions / gpu.issue)


def audited(path: Path = AUDIT) -> dict[tuple[str, str], tuple[float, float]]:
    """(kernel, target) -> instructions and bytes an element, of bf16 parameters and gradients."""
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        if (row["params"], row["grads"]) == PAIR and row["kernel"] in KERNELS and "accesses" in row:
            moved = sum(row["bytes_per_element"].values())
            found[row["kernel"], row["target"]] = (row["instructions_per_element"], moved)
    return found


def main(argv: Sequence[str]) -> int:
    """Project, show and save."""
    parser = suite.parser("roofline", __doc__)
    parser.add_argument("--audit", type=Path, default=AUDIT, help="the audit's JSON")
    options = parser.parse_args(argv)
    options.out = options.out or AUDIT.parent
    counts = audited(options.audit)
    projected = {
        gpu: {kernel: project(gpu, *counts[kernel, gpu.target]) for kernel in KERNELS} for gpu in GPUS
    }
    rows: list[list[Cell | str]] = []
    for gpu, of in projected.items():
        for kernel, label in KERNELS.items():
            instructions, moved = counts[kernel, gpu.target]
            got = of[kernel]
            cells = [
                f"{instructions:.1f}",
                f"{moved:.2f}",
                f"{1e3 * got.memory:.2f}",
                f"{1e3 * got.issue:.2f}",
            ]
            cells += [f"{1e3 * got.seconds:.2f}", got.bound, f"{got.memory / got.seconds:.0%}"]
            rows.append([f"{gpu.name}: {label}", *cells])
    notes = [
        "memory: bytes over the achieved bandwidth; issue: instructions over units x lanes x clock; a step "
        "is the longer, if all overlaps",
        "bytes: what all threads ask for, the scales of a block more than once; ours has 10.06 to move, "
        "flashoptim 10.25, and 12.25 with corrected weights",
        *(
            f"{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s ({gpu.source}), {gpu.issue / 1e12:.1f}e12 "
            "lane-instructions a second"
            for gpu in GPUS
        ),
    ]
    table = Table(
        "Projected, not measured: milliseconds for 1e9 bf16 parameters and gradients; counts an element",
        ["GPU: kernel", "instructions", "bytes", "memory", "issue", "at best", "bound", "bandwidth"],
        rows,
        notes,
    )  # fmt: skip
    data: dict[str, Any] = {
        "note": "projected, not measured",
        "gpus": {gpu.name: {**vars(gpu), "issue": gpu.issue} for gpu in GPUS},
        "seconds": {
            gpu.name: {kernel: vars(of[kernel]) for kernel in KERNELS} for gpu, of in projected.items()
        },
    }
    suite.finish("roofline", argv, options, [table], data, lambda: figure(projected))
    return 0


def figure(projected: dict[Gpu, dict[str, Projection]]) -> Figure:
    """Two marks a kernel, memory and issue: the right one is the bound."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 6.4), layout="constrained")
    panels = drawing.subplots(2, 3, sharey=True).flat
    kernels = list(reversed(KERNELS))
    for axes, (gpu, of) in zip(panels, projected.items(), strict=True):
        for place, kernel in enumerate(kernels):
            got = of[kernel]
            colour = suite.OURS if KERNELS[kernel].startswith("adamw_triton") else suite.COLOURS["flashoptim"]
            axes.barh(
                place,
                1e3 * got.seconds,
                color=colour,
                height=0.55,
                alpha=0.35 if got.bound == "issue" else 0.9,
            )
            axes.plot([1e3 * got.memory] * 2, [place - 0.36, place + 0.36], color="black", lw=2)
            axes.text(1e3 * got.seconds, place, f"  {1e3 * got.seconds:.2f}", va="center", size=8)
        axes.set_yticks(range(len(kernels)), [KERNELS[kernel] for kernel in kernels])
        axes.set_title(gpu.name, loc="left", size=10)
        axes.margins(x=0.2)
        suite.axes_style(axes)
        axes.grid(axis="y", visible=False)
    drawing.supxlabel(
        "milliseconds for 1e9 parameters; black: its bytes alone; pale: bound by instructions, not by memory",
        size=9,
    )
    drawing.suptitle(
        "Projected, not measured: the roofline of the compiled kernels", x=0.01, ha="left", weight="bold"
    )
    return drawing
