"""``python -m bench compiled``: every compiled kernel for every NVIDIA target, run without a GPU and compared
with its specification.

The PTX that Triton makes runs on an emulator (bench/ptx/README.md), through the launcher, on CPU tensors.
What is checked is told in `bench.compiled.checks`. Beside it: tensors beyond 2**32 elements, whether the
assembler changed arithmetic after the PTX, and the work of an element.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from triton import knobs

from bench import report
from bench.compiled import work
from bench.compiled.assembled import Assembled, assembled
from bench.compiled.checks import CAPABILITIES, QUICK_PAIRS, Case, cases, check
from bench.compiled.comparison import Report
from bench.compiled.huge import check_huge
from bench.compiled.problems import KERNELS
from bench.report import Cell, Table
from bench.suite import DTYPES

RESULTS = report.RESULTS / "aot"
QUICK = (75, 90)
Found = dict[Case, Report]


def huge(case: tuple[int, str]) -> list[str]:
    """In a process of its own: what differs, or why it did not run."""
    capability, kernel = case
    torch.set_num_threads(1)
    try:
        dtype = DTYPES[KERNELS[kernel].params[-1]]
        return check_huge(capability, KERNELS[kernel], dtype, dtype)
    except MemoryError:
        return ["the system gives out no memory that is not there"]
    except Exception as error:  # of the emulator: a finding, too
        return [f"stopped: {type(error).__name__}: {error}"]


def quick_check(case: Case) -> Report:
    """Fewer steps."""
    return check(case, quick=True)


# --- Tables --------------------------------------------------------------------------------------------


def summary(found: Found, far: dict[tuple[int, str], list[str]], changed: Sequence[Assembled]) -> Table:
    """A row for each target and kernel."""
    rows: list[list[Cell | str]] = []
    for capability, kernel in dict.fromkeys((case.capability, case.kernel) for case in found):
        reports = [r for case, r in found.items() if (case.capability, case.kernel) == (capability, kernel)]
        made = [one for one in changed if (one.case.capability, one.case.kernel) == (capability, kernel)]
        wrong = sum(len(each.problems) for each in reports) + len(far.get((capability, kernel), ()))
        spilling = sum(bool(one.local) for one in made)
        codes = [max(_figures(reports, f"{name} that differ"), default=0.0) for name in _CODES]
        rows.append(
            [
                f"sm_{capability} {kernel}",
                str(len(reports)),
                Cell(str(wrong), "bad" if wrong else "good"),
                report.number(max(_figures(reports, "weight, ulps"), default=0.0)),
                "" if KERNELS[kernel].block else report.number(max(_figures(reports, "exp_avg_sq, ulps"))),
                " ".join(report.number(share) for share in codes) if KERNELS[kernel].block else "",
                str(sum(bool(one.fused) for one in made)),
                Cell(str(spilling), "bad" if spilling else "good"),
            ]
        )
    columns = [
        "target, kernel", "builds", "unexplained", "weights, ulps", "v, ulps", "codes of m, v",
        "fused later", "spill",
    ]  # fmt: skip
    notes = [
        "Ulps: the largest distance from the specification, with inexact instructions as far off as may be.",
        "Codes: the largest share that is one away. Fused later, spill: builds.",
        "Not run here: AMD (compiled and disassembled by `bench audit`), caches, streams, copies, graphs.",
    ]
    return Table("Compiled kernels on the emulator", columns, rows, notes)


_CODES = ("exp_avg_codes", "exp_avg_sq_codes")


def _figures(reports: Sequence[Report], ending: str) -> list[float]:
    return [value for each in reports for name, value in each.figures.items() if name.endswith(ending)]


def known(found: Found) -> Table:
    """Differences on extreme inputs whose cause is known, and harmless races: of all targets, one example."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for case, each in found.items():
        for kind, example in each.notes.items():
            key = f"{case.kernel} {kind}"
            counts[key] += each.explained.get(kind, 0)
            examples.setdefault(key, "" if "races" in kind else example.rsplit(": ", 1)[-1])
    rows = [[key, str(counts[key] or ""), examples[key]] for key in sorted(examples)]
    return Table("Differences with a known cause", ["kind", "elements", "example"], rows)


def unexplained(found: Found, far: dict[tuple[int, str], list[str]], changed: Sequence[Assembled]) -> Table:
    rows = [[str(case), problem] for case, each in found.items() for problem in each.problems]
    rows += [
        [f"sm_{capability} {kernel}", f"huge: {line}"]
        for (capability, kernel), lines in far.items()
        for line in lines
    ]
    rows += [[str(one.case), f"spills: {one.local}"] for one in changed if one.local]
    return Table("Unexplained", ["build", "what"], rows)


# --- The run -------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 if anything differs without a known cause, or a build spills."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two targets, two pairs of dtypes; written only with --out"
    )
    parser.add_argument("--targets", nargs="+", metavar="sm_NN", help="default: all")
    parser.add_argument("--out", type=Path, help=f"folder for compiled.json and .md (default: {RESULTS})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(argv)
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: unset it to compile ahead of time.", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    chosen = QUICK if options.quick else CAPABILITIES
    capabilities = [int(name.removeprefix("sm_")) for name in options.targets or ()] or chosen
    todo = cases(capabilities, QUICK_PAIRS if options.quick else None)
    console = report.console()
    # Not forked: the compilers keep threads.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:

        def run(what: str, function: Callable[[Any], Any], items: Sequence[Any]) -> dict[Any, Any]:
            results = track(pool.map(function, items), what, total=len(items), console=console)
            return dict(zip(items, results, strict=True))

        found: Found = run("running", quick_check if options.quick else check, todo)
        far: dict[tuple[int, str], list[str]] = {}
        changed: dict[Case, Assembled] = {}
        if not options.quick:
            far = run(
                "beyond 2**32",
                huge,
                [(capability, kernel) for capability in capabilities for kernel in KERNELS],
            )
            changed = run("machine code", assembled, todo)
    wrong = unexplained(found, far, list(changed.values()))
    tables = [
        summary(found, far, list(changed.values())),
        wrong,
        known(found),
        work.table(work.count()),
    ]
    tables = [table for table in tables if table.rows]
    for table in tables:
        report.show(table, console)
    seconds = time.perf_counter() - begin
    console.print(f"{len(todo)} builds, {seconds:.0f} s with {options.jobs} processes")
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        run_of = {**report.environment("compiled", list(argv or ()), 0), "seconds": seconds}
        report.save(out, "compiled", run_of, tables, data(found, far, list(changed.values())))
        console.print(f"written to {out}")
    return int(bool(wrong.rows))


def data(found: Found, far: dict[tuple[int, str], list[str]], changed: Sequence[Assembled]) -> dict[str, Any]:
    """Every figure, for the JSON."""
    return {
        "cases": {
            str(case): {
                "seconds": each.seconds,
                "figures": each.figures,
                "problems": each.problems,
                "explained": each.explained,
                "notes": each.notes,
                "instructions": sum(each.opcodes.values()),
            }
            for case, each in found.items()
        },
        "huge": {f"sm_{capability} {kernel}": lines for (capability, kernel), lines in far.items()},
        "assembled": {
            str(one.case): {"fused": one.fused, "again": one.again, "local": one.local}
            for one in changed
            if one.fused or one.again or one.local
        },
    }


if __name__ == "__main__":
    sys.exit(main())
