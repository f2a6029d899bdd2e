"""The command line as its argparse has it, in words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from adamw_triton.cli import build_parser


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every sub-command's grammar."""
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise LookupError("the command line has no sub-commands")


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """What may stand on its line, and what that means."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
        if action.choices is not None and not action.metavar:
            meaning += f" One of: {', '.join(map(str, action.choices))}."
        yield _written(action), meaning.strip()


def _written(action: argparse.Action) -> str:
    value = action.metavar or action.dest.upper()
    if isinstance(value, tuple):
        value = " ".join(value)
    if not action.option_strings:
        return f"[{value}]" if action.nargs == "?" else value
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {value}{' ...' if action.nargs == '+' else ''}"


def sentence(description: str) -> str:
    return f"{description[0].upper()}{description[1:].rstrip('.')}."
