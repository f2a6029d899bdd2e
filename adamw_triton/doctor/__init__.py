"""What this machine has and what it can reach: a table of checks, each with a verdict and advice.

Kept light: torch is imported by ``machine``, when the checks run.
"""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, PROBLEM, SKIPPED = "ok", "warning", "problem", "skipped"


class Finding(NamedTuple):
    """What a check found. ``problem`` means that kernels or paging cannot work on the GPU that is here."""

    verdict: str
    text: str
    advice: str = ""
