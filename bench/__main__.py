"""``python -m bench SUITE [options]``: run one suite of measurements.

Each suite is a module with ``main(argv) -> int``. It is imported only when chosen, so that a suite
needs no other suite's libraries.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

SUITES = {
    "fidelity": "how closely each state format follows fp32 AdamW on the same gradients",
    "audit": "what the compiled kernels are made of: instructions, registers, memory access",
    "host": "what a step costs on the host, before any GPU work",
}


def usage() -> str:
    """The list of suites, for a terminal."""
    suites = "\n".join(f"  {name:<10} {about}" for name, about in SUITES.items())
    return f"usage: python -m bench SUITE [options; --help lists them]\n\n{suites}"


def main(argv: Sequence[str]) -> int:
    """Run the suite that ``argv`` names. 0: goals met; 1: a goal missed; 2: it cannot run as asked."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *options = argv
    if name not in SUITES:
        print(f"no suite is called {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module = f"bench.{name}"
    if importlib.util.find_spec(module) is None:
        print(f"the suite {name!r} is planned but has not been written yet", file=sys.stderr)
        return 2
    return importlib.import_module(module).main(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
