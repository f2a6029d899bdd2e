"""What every suite does with its results: tables on the terminal, and JSON, Markdown and PNG on disk."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    "torch", "triton", "bitsandbytes", "torchao", "flashoptim", "torch-optimi", "transformers", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, and how much it matters: "good", "bad", "bold" or "" (plain)."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table that prints the same on a terminal and in Markdown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    notes: Sequence[str] = field(default_factory=tuple)
    """Lines under the table."""


_TERMINAL_STYLES = {"good": "bold green", "bad": "bold red", "bold": "bold", "": ""}


def console() -> Console:
    """The terminal, or what its output is piped to: that has no width, so lines may be long."""
    return Console(width=None if sys.stdout.isatty() else 200)


def show(table: Table, console: Console) -> None:
    """Draw ``table`` on the terminal: the first column left, the others right."""
    drawn = RichTable(title=table.title, title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        drawn.add_column(column, no_wrap=True, justify="left" if index == 0 else "right")
    for row in table.rows:
        drawn.add_row(*(Text(cell.text, _TERMINAL_STYLES[cell.style]) for cell in map(_cell, row)))
    console.print(drawn)
    for note in table.notes:
        console.print(Text(f"  {note}", "dim"))
    console.print()


def markdown(table: Table) -> str:
    """``table`` in GitHub's Markdown; cells that matter are bold."""
    lines = [_markdown_row(table.columns), "|---" + "|---:" * (len(table.columns) - 1) + "|"]
    lines += [_markdown_row(_emphasized(_cell(cell)) for cell in row) for row in table.rows]
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"## {table.title}", "", *lines, "", *notes, ""])


def number(value: float, digits: int = 3) -> str:
    """``value`` with so many significant digits; not finite values in words."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 10**digits else f"{value:,.0f}"


def _cell(cell: Cell | str) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def _emphasized(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.style and cell.text else cell.text


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


# --- The machine and the run ---------------------------------------------------------------------------


def processor() -> str:
    """The CPU's name as its maker gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def machine_slug(device: str = "cpu") -> str:
    """A folder name for this machine's results: ``cpu-amd-epyc``, ``cuda-nvidia-h100``."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {name}".lower()).strip("-")


def environment(suite: str, options: Sequence[str], seed: int, device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge a result, or to repeat it."""
    return {
        "device": device,
        "command": " ".join(["python -m bench", suite, *options]),
        "seed": seed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "host_memory": host_memory(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "clocks": clocks(device),
        "python": platform.python_version(),
        "versions": {library: _version(library) for library in LIBRARIES},
    }


def host_memory() -> int | None:
    """Bytes that may still be taken; some machines' memory grows with what is."""
    from adamw_triton.memory.host import host_limit

    limit = host_limit()
    return None if limit is None else limit.available


def clocks(device: str) -> str | None:
    """What the device runs at, as its driver or the kernel says it at the end of the run."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.draw", "--format=csv"]
        try:
            return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None
    cpuinfo = Path("/proc/cpuinfo")
    found = re.findall(r"cpu MHz\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{', '.join(found)} MHz" if found else None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None outside of git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def save(
    folder: Path,
    stem: str,
    run: dict[str, Any],
    tables: Sequence[Table],
    data: Any,
    figure: Figure | None = None,
) -> list[Path]:
    """Write ``stem``.json, .md and, with a figure, .png; the files written.

    Not-finite numbers become null in the JSON, which has no others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {".json": folder / f"{stem}.json", ".md": folder / f"{stem}.md"}
    if figure is not None:
        files[".png"] = folder / f"{stem}.png"
        figure.savefig(files[".png"], dpi=160)
    content = _finite({"run": run, **data})
    files[".json"].write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    picture = [f"![{stem}]({stem}.png)", ""] if figure is not None else []
    files[".md"].write_text("\n".join([_heading(stem, run), *picture, *map(markdown, tables)]))
    return list(files.values())


def _heading(stem: str, run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    place = run["gpu"] or f"{run['cpu']}, {run['threads']} threads"
    return f"# {stem}\n\n`{run['command']}` on {place}, {run['date']}, commit {run['commit']}; {versions}.\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
