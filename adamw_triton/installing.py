"""How this is installed: the one place to switch once a package index has it."""

from __future__ import annotations

PUBLISHED = False
"""Whether a package index has adamw-triton. tests/package/test_installing.py finds what follows it."""


def command(extra: str) -> str:
    """What to type for an extra of pyproject.toml, like ``"demo"``."""
    if PUBLISHED:
        return f'pip install "adamw-triton[{extra}]"'
    return f'pip install ".[{extra}]" in a clone of adamw_triton'


def missing(package: str, extra: str) -> str:
    """What to say, in a line, where a package of an extra is not there."""
    return f"the package {package} is missing: {command(extra)}"
