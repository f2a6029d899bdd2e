"""``python -m bench SUITE [options]``: run one suite of measurements; ``--all`` or ``--quick``: all of them.

Each suite is a module with ``main(argv) -> int``. It is imported only when chosen, so that a suite
needs no other suite's libraries.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

from adamw_triton.installing import missing
from bench.commands import COMMANDS, PACKAGES, PROOFS, SUITES, home, usage


def main(argv: Sequence[str]) -> int:
    """Run the suite that ``argv`` names. 0: goals met; 1: a goal missed; 2: it cannot run as asked; 3: it
    failed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *options = argv
    if not name.startswith("-") and name not in SUITES | PROOFS | COMMANDS:
        print(f"no suite is called {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module, options = ("bench.every", [name, *options]) if name.startswith("-") else (home(name), options)
    try:
        return int(importlib.import_module(module).main(options))
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in PACKAGES:
            raise
        print(f"bench {name}: {missing(package, 'bench')}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception:  # 1, Python's own status for it, is a goal that was missed
        traceback.print_exc()
        sys.exit(3)
