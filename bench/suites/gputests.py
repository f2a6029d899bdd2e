"""``python -m bench gputests``: the tests that need a GPU, and how they went, file by file.

Several at a time first; then, one by one, those marked ``alone``, which take the GPU's memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import children, suite
from bench.children import ROOT
from bench.report import Cell, Table

PHASES = {"beside": ("gpu and not alone", 0.65), "alone": ("gpu and alone", 1.0)}
"""(what it takes, its share of the time that is left)"""
WORKERS = 8
"""Each compiles kernels, which takes longer than running them, and has a CUDA context of half a GiB."""
NO_TESTS = 5
"""pytest's exit status."""
OUTCOMES = ("passed", "failed", "skipped")


@dataclass(frozen=True)
class Test:
    """One line of a report."""

    file: str
    name: str
    outcome: str
    seconds: float
    message: str


def files() -> list[str]:
    """Test files that speak of the marker: others need not be imported, nor the libraries they test."""
    found = (path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    return sorted(str(path.relative_to(ROOT)) for path in found)


def read(xml: Path) -> Iterator[Test]:
    """A report in JUnit's format."""
    for case in ElementTree.parse(xml).iter("testcase"):
        trouble = {child.tag: child.get("message", "") for child in case}
        outcome = "failed" if {"failure", "error"} & set(trouble) else "passed"
        if outcome == "passed" and "skipped" in trouble:
            outcome = "skipped"
        file = case.get("classname", "") or case.get("name", "")
        message = " ".join(trouble.get("failure", trouble.get("error", "")).split())
        place = f"{file.replace('.', '/')}.py"
        yield Test(place, case.get("name", ""), outcome, float(case.get("time", 0)), message)


def command(phase: str, xml: Path, workers: int) -> list[str]:
    options = [f"--junitxml={xml}", "-m", PHASES[phase][0], "-q", "-rfE", "--tb=short", "--durations=10"]
    options += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["-n", str(workers)] if workers and phase == "beside" else []
    return [sys.executable, "-m", "pytest", *options, *files()]


def workers(device: str) -> int:
    """At a time; 0 for none beside another."""
    if device == "cpu" or importlib.util.find_spec("xdist") is None:
        return 0
    return min(WORKERS, (os.cpu_count() or 1) // 2)


def record(tests: Sequence[Test], ended: dict[str, int | None]) -> dict[str, Any]:
    """For the JSON. Whatever stopped a phase before its end is no success."""
    by_file: dict[str, Counter[str]] = {}
    for test in tests:
        counts = by_file.setdefault(test.file, Counter(dict.fromkeys(OUTCOMES, 0)))
        counts[test.outcome] += 1
        counts["milliseconds"] += round(1e3 * test.seconds)
    broken = [phase for phase, code in ended.items() if code not in (None, 0, 1, NO_TESTS)]
    return {
        "total": {outcome: sum(test.outcome == outcome for test in tests) for outcome in OUTCOMES},
        "files": by_file,
        "failures": {f"{test.file}::{test.name}": test.message for test in tests if test.outcome == "failed"},
        "stopped": [phase for phase, code in ended.items() if code is None],
        "broken": broken,
        "exit": ended,
    }


def table(data: dict[str, Any], seconds: float) -> Table:
    rows: list[list[Cell | str]] = [
        [file, *(str(counts[outcome]) for outcome in OUTCOMES), f"{counts['milliseconds'] / 1e3:.1f}"]
        for file, counts in data["files"].items()
    ]
    rows.append(
        ["all", *(Cell(str(data["total"][outcome]), "bold") for outcome in OUTCOMES), f"{seconds:.0f}"]
    )
    notes = [f"failed: {name}: {message[:200]}" for name, message in data["failures"].items()]
    notes += [f"{phase}: stopped at the end of its time" for phase in data["stopped"]]
    notes += [f"{phase}: pytest ended with {data['exit'][phase]}" for phase in data["broken"]]
    return Table("Tests on a GPU", ["file", *OUTCOMES, "seconds"], rows, notes)


def main(argv: Sequence[str]) -> int:
    """Run them, show and save; 0 if none failed and none is missing."""
    parser = suite.parser("gputests", __doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for all of them (default 600)")
    options = parser.parse_args(argv)
    folder = suite.folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    tests: list[Test] = []
    ended: dict[str, int | None] = {}
    for phase, (_, share) in PHASES.items():
        xml = (folder / f"gputests-{phase}.xml").resolve()
        xml.unlink(missing_ok=True)
        left = share * (options.seconds - (time.monotonic() - began))
        with (folder / f"gputests-{phase}.txt").open("w") as log:
            ended[phase] = children.run(
                command(phase, xml, workers(options.device)), left, children.environment(), log
            )
        tests += read(xml) if xml.exists() else ()
    data = record(tests, ended)
    suite.finish("gputests", argv, options, [table(data, time.monotonic() - began)], data)
    for phase in PHASES if data["failures"] else data["broken"]:
        text = (folder / f"gputests-{phase}.txt").read_text(errors="replace")
        print(re.sub(r"\n{3,}", "\n\n", text[-3000:]), flush=True)
    return int(bool(data["failures"] or data["stopped"] or data["broken"]))
