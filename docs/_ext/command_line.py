"""``{command-line} NAME``: a command of ours as its argparse has it. No name: the command itself."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from grammar import commands, options, sentence
from sphinx.util.docutils import SphinxDirective

from adamw_triton.cli import build_parser


class CommandLine(SphinxDirective):
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        parser = commands()[self.arguments[0]] if self.arguments else build_parser()
        usage = parser.format_usage()
        shown: list[nodes.Node] = [nodes.literal_block(usage, usage, language="text")]
        if parser.description:
            shown.insert(0, nodes.paragraph("", sentence(parser.description)))
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
