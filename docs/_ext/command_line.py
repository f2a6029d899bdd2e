"""``{command-line} NAME``: a command of ours as its argparse has it. No name: the command itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

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


class CommandLine(SphinxDirective):
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        parser = commands()[self.arguments[0]] if self.arguments else build_parser()
        usage = parser.format_usage()
        shown: list[nodes.Node] = [nodes.literal_block(usage, usage, language="text")]
        if parser.description:
            shown.insert(0, nodes.paragraph("", f"{parser.description[0].upper()}{parser.description[1:]}."))
        rows = nodes.definition_list()
        for written, meaning in options(parser):
            term = nodes.term("", "", nodes.literal(written, written))
            rows += nodes.definition_list_item(
                "", term, nodes.definition("", nodes.paragraph(meaning, meaning))
            )
        return [*shown, rows]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True}
