"""The sub-commands that have a file of their own; each has an ``add`` for the grammar of the command line.

They import what they need when they run, so that ``--help`` needs neither torch nor rich.
"""

from __future__ import annotations

import sys

USAGE_ERROR = 2


def fail(command: str, message: str) -> int:
    """Say in one line what is wrong; the exit code for it."""
    print(f"adamw-triton {command}: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR
