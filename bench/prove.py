"""``python -m bench prove``: all that is to be shown on a GPU, in one command and under ten minutes.

For a machine with a GPU and without network: installs the wheels that ``bench wheels`` fetched, for its own
processes alone; runs the GPU tests, compute-sanitizer and the suites, each for at most its share of the time;
judges the goals; and packs everything, into ``$OUT`` too if that is set. What one part leaves of its share,
those behind it may take; whatever happens to one, the others run. Suites that need no GPU are left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import torch

from bench import children, goals, report
from bench.children import ROOT
from bench.every import ENDED, QUICK_FOLDER
from bench.report import Cell, Table
from bench.wheels import FOLDER, PEERS

SITE = ROOT / "build" / "peers"
"""Where the wheels are installed."""
NEVER = ("torch-", "triton-", "nvidia_")
"""The machine's own stay."""
CLOSING = 20.0
"""Seconds for stopping the last part, the table and the packing."""


@dataclass(frozen=True)
class Part:
    """A suite, and the seconds that are kept for it."""

    suite: str
    share: float
    told: bool = False
    """It is told how long it has, and leaves what it has by then."""


# The most important first. In brackets the seconds that each took on an H100.
PARTS = (
    Part("gputests", 85, told=True),  # [62]
    Part("sanitize", 20, told=True),  # [10]
    Part("limit", 95, told=True),
    Part("step", 95),
    Part("tokens", 95, told=True),
    Part("paged", 25),  # [17]
    Part("host", 20),  # [20]
    Part("memory", 30),  # [25]
    Part("telemetry", 15),
    Part("first", 45),  # [34]
)


def main(argv: Sequence[str]) -> int:
    """Prove what can be; 0 if all goals are met, 1 if one is missed, 2 if one is not measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench prove",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default 9.5)")
    parser.add_argument("--quick", action="store_true", help="a look at each part")
    parser.add_argument("--parts", nargs="+", choices=[part.suite for part in PARTS], metavar="PART")
    parser.add_argument("--out", type=Path, help="folder of the results (default bench/results/<machine>)")
    options = parser.parse_args(argv)
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.out or (QUICK_FOLDER if options.quick else report.RESULTS / report.machine_slug(device))
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if not options.parts or part.suite in options.parts]
    for part in chosen:  # an earlier run's figures are not this one's
        (folder / f"{part.suite}.json").unlink(missing_ok=True)
    path = install(FOLDER, SITE)
    ended, took = run_all(chosen, folder, path, began, 60 * options.minutes, options.quick)
    report.show(summary(ended, took, time.monotonic() - began), report.console())
    code = goals.finish(folder, ended, " ".join(["python -m bench prove", *argv]))
    pack(folder, os.environ.get("OUT"))
    print(f"everything is in {folder}; {time.monotonic() - began:.0f} s")
    return code


def install(wheels: Path, site: Path) -> list[Path]:
    """Unpack the wheels for our processes, and say which peers are not here; what to put on their path."""
    found = [wheel for wheel in sorted(wheels.glob("*.whl")) if not wheel.name.startswith(NEVER)]
    path = []
    if found:
        shutil.rmtree(site, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        how = ["install", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
        code = children.run([*pip, *how, *map(str, found)], 60, children.environment())
        path = [site] if code == 0 else []
        if code != 0:
            print(f"the wheels in {wheels} could not be installed: pip ended with {code}")
    names = (str(each.metadata["Name"]) for each in distributions(path=[*map(str, path), *sys.path]))
    there = {name.lower().replace("_", "-") for name in names}
    missing = [peer for peer in PEERS if peer not in there]
    print(f"peers: {', '.join(sorted(set(PEERS) - set(missing))) or 'none'}")
    if missing:
        print(f"not here: {', '.join(missing)} (python -m bench wheels fetches them into {wheels.name}/)")
    return path


def run_all(
    parts: Sequence[Part], folder: Path, path: Sequence[Path], began: float, limit: float, quick: bool
) -> tuple[dict[str, str], dict[str, float]]:
    """How each part ended, and the seconds it took. Each ends by the sum of the shares up to it."""
    due = time.monotonic() - began
    scale = (limit - CLOSING - due) / sum(part.share for part in parts)
    ended, took = {}, {}
    for part in parts:
        due += part.share * scale
        start = time.monotonic()
        ended[part.suite] = run(part, folder, path, began + due - start, quick)
        took[part.suite] = time.monotonic() - start
    return ended, took


def command(part: Part, folder: Path, left: float, quick: bool) -> list[str]:
    options = ["--out", str(folder.resolve()), *(["--quick"] if quick else [])]
    options += ["--seconds", f"{max(1, left - 2 * children.GRACE):.0f}"] if part.told else []
    return [sys.executable, "-m", "bench", part.suite, *options]


def run(part: Part, folder: Path, path: Sequence[Path], left: float, quick: bool) -> str:
    """One part, for at most so many seconds, and those that it takes to stop."""
    if left < 1:
        return "left out: no time"
    print(f"\n== {part.suite} (up to {left:.0f} s)", flush=True)
    threads = {"OMP_NUM_THREADS": "1"} if quick else {}
    code = children.run(command(part, folder, left, quick), left, children.environment(path, **threads))
    if code is None:
        return "stopped at the end of its share"
    return ENDED[code].text if code in ENDED else f"failed with {code}"


def summary(ended: dict[str, str], took: dict[str, float], total: float) -> Table:
    rows: list[list[Cell | str]] = [[name, f"{took[name]:.0f} s", how] for name, how in ended.items()]
    return Table("Parts", ["part", "took", "ended"], rows, [f"{total:.0f} s in all"])


def pack(folder: Path, out: str | None) -> None:
    """A tar of the folder, and what a reader wants first, where they are fetched from."""
    if not out:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    with tarfile.open(Path(out) / f"{folder.name}.tar.gz", "w:gz") as packed:
        packed.add(folder, arcname=folder.name)
    for name in ("goals.md", "goals.json", "gputests.md", "gputests-beside.txt", "gputests-alone.txt"):
        if (folder / name).exists():
            shutil.copy(folder / name, out)
