"""What the suites share: their command line, and how they end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import report
from bench.report import Cell, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Ours, then the peers by library: hues that the colour-blind can tell apart (Okabe and Ito).
OURS = "#0072B2"
COLOURS = {
    "torch": "#555555", "bitsandbytes": "#D55E00", "torchao": "#009E73", "flashoptim": "#CC79A7",
    "torch-optimi": "#E69F00", "adamw-triton": OURS,
}  # fmt: skip


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """``--quick``, ``--seed``, ``--device`` and ``--out``."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="a look, in seconds")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    made.add_argument("--out", type=Path, help="folder of the results (default bench/results/<machine>)")
    return made


def folder(options: argparse.Namespace) -> Path:
    """Of the results."""
    chosen: Path = options.out or report.RESULTS / report.machine_slug(options.device)
    return chosen


def write(
    name: str,
    argv: Sequence[str],
    options: argparse.Namespace,
    tables: Sequence[Table],
    data: dict[str, Any],
    figure: Figure | None = None,
) -> list[Path]:
    """Write what there is: a suite that is stopped later has left that much."""
    run = report.environment(name, argv, options.seed, options.device)
    return report.save(folder(options), name, run, tables, data, figure)


def finish(
    name: str,
    argv: Sequence[str],
    options: argparse.Namespace,
    tables: Sequence[Table],
    data: dict[str, Any],
    draw: Callable[[], Figure] | None = None,
) -> None:
    """Show the tables, write everything, and say where. A machine without matplotlib gets no plot."""
    console = report.console()
    for table in tables:
        report.show(table, console)
    written = write(name, argv, options, tables, data)
    if draw is not None:
        try:
            written = write(name, argv, options, tables, data, draw())
        except ModuleNotFoundError as error:
            console.print(f"no plot: {error}")
    for file in written:
        console.print(f"wrote {file}")


def name_cell(key: str) -> Cell:
    """An optimizer's name; ours stands out."""
    return Cell(key, "bold" if key.startswith("adamw_triton") else "")


def reason_rows(reasons: Mapping[str, str], columns: int) -> list[list[Cell | str]]:
    """A row for each optimizer that cannot run."""
    return [[key, "cannot run", *[""] * (columns - 2)] for key in reasons]


def reason_notes(reasons: Mapping[str, str]) -> list[str]:
    return [f"{key} cannot run here: {reason}" for key, reason in reasons.items()]


def label_bars(axes: Any, names: Sequence[str], title: str, about: str, margin: float) -> None:
    """Around horizontal bars, the first name's on top."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel(about)
    axes.margins(x=margin)
    axes.set_title(title, loc="left", weight="bold")
    axes_style(axes)
    axes.grid(axis="y", visible=False)


def axes_style(axes: Any) -> None:
    """A light grid and no box."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
