"""``python -m bench --all`` and ``--quick``: every suite, in a process of its own, and how it ended."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import children, report
from bench.commands import SUITES
from bench.report import Cell, Table

QUICK_FOLDER = Path("build") / "bench-quick"
ENDED = {
    0: Cell("done", "good"),
    1: Cell("a goal missed", "bad"),
    2: Cell("cannot run", "bad"),
    3: Cell("failed", "bad"),
}


def main(argv: Sequence[str]) -> int:
    """Run them one after the other; 0 if each could run: goals that are missed are told, not an error."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="in full: on a GPU in under 10 minutes")
    which.add_argument("--quick", action="store_true", help="a look at each")
    parser.add_argument("--suites", nargs="+", choices=tuple(SUITES), default=tuple(SUITES), metavar="SUITE")
    parser.add_argument("--out", type=Path, help=f"folder of the results (quick: {QUICK_FOLDER})")
    parser.add_argument(
        "--minutes", type=float, default=10.0 if torch.cuda.is_available() else None,
        help="after these a suite is stopped, and those behind it are left out (default on a GPU: 10)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    folder = options.out or (QUICK_FOLDER if options.quick else None)
    began = time.monotonic()
    rows: list[list[Cell | str]] = []
    for name in options.suites:
        left = None if options.minutes is None else 60 * options.minutes - (time.monotonic() - began)
        start = time.monotonic()
        ended = run(name, options.quick, folder, left)
        rows.append([name, f"{time.monotonic() - start:.0f} s", ended])
    total = f"{time.monotonic() - began:.0f} s in all"
    report.show(Table("Suites", ["suite", "took", "ended"], rows, [total]), report.console())
    if options.all and folder is None:
        from bench import readme

        readme.main([])
    return int(any(row[-1] not in (ENDED[0], ENDED[1]) for row in rows))


def run(name: str, quick: bool, folder: Path | None, left: float | None) -> Cell:
    """One suite, for at most so many seconds."""
    if left is not None and left < 1:
        return Cell("left out: no time", "bad")
    command = [sys.executable, "-m", "bench", name, *(["--quick"] if quick else [])]
    command += ["--out", str(folder.resolve())] if folder else []
    # One thread in quick mode: several wait for each other wherever other work takes a core.
    threads = {"OMP_NUM_THREADS": "1"} if quick else {}
    print(f"\n== {' '.join(command[1:])}", flush=True)
    code = children.run(command, left, children.environment(**threads))
    if code is None:
        return Cell("stopped: out of time", "bad")
    return ENDED.get(code, Cell(f"failed with {code}", "bad"))
