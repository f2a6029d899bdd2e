"""``python -m bench sanitize``: compute-sanitizer's memcheck and racecheck over some of the kernels' tests.

Of our kernels alone, whose name is ``_kernel``. Beside them runs one with a planted error: if that goes
unnoticed, nothing was looked at, and that is no success.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import site
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import children, suite
from bench.report import Cell, Table

TOOLS = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
}
"""Where each says what it found."""
PLANTED = "planted"
TESTS = ["tests/kernels/test_memory.py", "-k", "memory_around or padding_has"]
"""Every format, aligned and not, on tensors of 1 to 4,097 elements."""


def places() -> Iterator[Path]:
    """Where the program may be: on the path, in a toolkit, in a package."""
    found = shutil.which("compute-sanitizer")
    if found:
        yield Path(found)
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    toolkits += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for toolkit in toolkits:
        yield toolkit / "bin" / "compute-sanitizer"
        yield toolkit / "compute-sanitizer" / "compute-sanitizer"
    for packages in (*site.getsitepackages(), site.getusersitepackages()):
        yield from Path(packages, "nvidia").rglob("compute-sanitizer")


def program() -> Path | None:
    """compute-sanitizer, if this machine has it."""
    return next((place for place in places() if place.is_file() and os.access(place, os.X_OK)), None)


def command(sanitizer: Path, run: str) -> list[str]:
    """A tool over the tests, or memcheck over the planted error."""
    # Of the application alone: compilers that it starts have nothing to check.
    options = ["--target-processes", "application-only", "--kernel-name", "kernel_name=_kernel"]
    options += ["--tool", "memcheck" if run == PLANTED else run]
    tests = ["pytest", *TESTS, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    return [str(sanitizer), *options, sys.executable, "-m", *(["bench.planted"] if run == PLANTED else tests)]


def outcome(tool: str, text: str, code: int | None) -> dict[str, Any]:
    """What a tool's output says; ``found`` is None where it says nothing."""
    found = re.search(TOOLS[tool], text)
    passed = re.search(r"(\d+) passed", text)
    reason = "stopped at the end of its time" if code is None else f"it ended with {code} and no summary"
    return {
        "found": int(found[1]) if found and passed else None,
        "tests": int(passed[1]) if passed else 0,
        "why": None if found and passed else reason,
    }


def outcomes(texts: dict[str, str], codes: dict[str, int | None]) -> dict[str, Any]:
    """Of both tools; nothing counts if the planted error went unnoticed."""
    planted = re.search(TOOLS["memcheck"], texts[PLANTED])
    if planted is None or int(planted[1]) == 0:
        return unable("a planted error went unnoticed")
    return {tool: outcome(tool, texts[tool], codes[tool]) for tool in TOOLS}


def unable(why: str) -> dict[str, Any]:
    return {tool: {"found": None, "tests": 0, "why": why} for tool in TOOLS}


def check(sanitizer: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Both tools and the planted error at once."""
    end = time.monotonic() + seconds
    # Each tensor its own allocation, so that memcheck knows where it ends.
    env = children.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    logs = {run: folder / f"sanitize-{run}.txt" for run in (*TOOLS, PLANTED)}
    with contextlib.ExitStack() as stack:
        running = {}
        for run, log in logs.items():
            running[run] = children.start(command(sanitizer, run), env, stack.enter_context(log.open("w")))
            stack.callback(children.kill, running[run])
        codes = {run: children.finish(one, max(0.0, end - time.monotonic())) for run, one in running.items()}
    return outcomes({run: log.read_text(errors="replace") for run, log in logs.items()}, codes)


def main(argv: Sequence[str]) -> int:
    """Check, show and save; 0 if nothing was found, 2 if nothing could be looked for."""
    parser = suite.parser("sanitize", __doc__)
    parser.add_argument("--seconds", type=float, default=120, help="for all (default 120)")
    options = parser.parse_args(argv)
    sanitizer = program()
    if options.device == "cpu":
        tools = unable("no GPU")
    elif sanitizer is None:
        tools = unable("compute-sanitizer is not on this machine")
    else:
        suite.folder(options).mkdir(parents=True, exist_ok=True)
        tools = check(sanitizer, suite.folder(options), options.seconds)
    data = {"program": None if sanitizer is None else str(sanitizer), "tools": tools}
    suite.finish("sanitize", argv, options, [table(data)], data)
    found = [tool["found"] for tool in tools.values()]
    return 2 if None in found else int(any(found))


def table(data: dict[str, Any]) -> Table:
    rows: list[list[Cell | str]] = []
    for tool, got in data["tools"].items():
        clean = Cell("clean", "good") if got["found"] == 0 else Cell(f"{got['found']} found", "bad")
        rows.append(
            [tool, str(got["tests"]), clean if got["found"] is not None else f"not run: {got['why']}"]
        )
    return Table("compute-sanitizer", ["tool", "tests passed", "outcome"], rows, [" ".join(TESTS)])
