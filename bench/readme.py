"""``python -m bench readme``: bench/README.md, from the results there are."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import report
from bench.commands import PROOFS, SUITES

HEAD = """# The bench

Written by `python -m bench readme` from `bench/results/`; not by hand.

- `python -m bench --quick`: a look at every suite, in minutes, on any machine
- `python -m bench --all`: in full; results under `bench/results/<machine>/`, then this page
- `python -m bench SUITE --help`: one suite

On a GPU machine without network, two commands: here `python -m bench wheels`, which fetches the peers'
wheels; there, in a copy of this folder with its `.whl/`, `python3 -m bench prove`. In under ten minutes it
runs the GPU tests, compute-sanitizer and the suites, the most important first, and judges every goal. Results
go to `bench/results/<gpu>/`, and packed to `$OUT` where that is set.

Each suite writes a table, a plot and a JSON with versions, clocks, seeds and every figure. Optimizers take
turns in every round, in an order drawn anew; times are medians, and first steps are told apart.
A peer that cannot run is a row that says so. A figure of a GPU stands here once it was measured on one.
"""


def machines(results: Path) -> list[Path]:
    """Folders of results, those that are compiled or projected last."""
    return sorted(
        (one for one in results.iterdir() if one.is_dir()), key=lambda one: (one.name == "aot", one.name)
    )


def section(machine: Path, root: Path) -> Iterator[str]:
    """Every suite's page, one level down."""
    title = "Compiled or projected, not measured" if machine.name == "aot" else f"Measured: {machine.name}"
    yield f"## {title}\n"
    for name in ("goals", *PROOFS, *SUITES):
        page = machine / f"{name}.md"
        if not page.exists():
            continue
        if name == "audit":  # a page of its own
            yield f"### audit\n\n[Machine code of every kernel for every target]({page.relative_to(root)})\n"
            continue
        text = re.sub(r"^(#+) ", r"##\1 ", page.read_text(), flags=re.MULTILINE)
        folder = machine.relative_to(root).as_posix()
        yield re.sub(r"!\[(.*?)\]\((.*?)\)", rf"![\1]({folder}/\2)", text)


def main(argv: Sequence[str]) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=__doc__)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    options = parser.parse_args(argv)
    root = options.results.parent
    parts = [HEAD, *(text for machine in machines(options.results) for text in section(machine, root))]
    target = root / "README.md"
    target.write_text("\n".join(parts).rstrip() + "\n")
    print(f"wrote {target}")
    return 0
