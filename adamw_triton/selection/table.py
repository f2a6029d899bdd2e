"""A small table as text, for rich, and as HTML for a notebook."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

MARK = "→"
WIDTH = 80
"""Columns of a terminal that nobody has made wider."""
INDENT = "  "
STYLES = {"title": "bold", "head": "", "row": "", "marked": "bold green", "note": "dim"}

# A number and its unit, and what it is added to or taken from, stay together.
_BOUND = re.compile(r"(?<=\d) (?=(?:[KMGT]i?)?B\b|GB/s|ms\b|s\b)|(?<= [-=]) (?=-?\d)")


def fill(text: str, width: int = WIDTH, indent: str = "") -> str:
    """Lines of so many columns at most, if words are no longer; all but the first begin with ``indent``."""
    bound = _BOUND.sub("\xa0", text)
    lines = textwrap.wrap(
        bound, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\xa0", " ")


@dataclass(frozen=True)
class Table:
    """``rows`` of cells, the first column left and the others right, the last one left again."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    marked: int | None = None
    """The row to point at."""

    def text(self, width: int = WIDTH) -> str:
        """Lines of so many columns at most, if words are no longer."""
        return "\n".join(line for _, lines in self._parts(width) for line in lines)

    def rich(self, width: int) -> Group:
        """The same with colours. Needs the package rich."""
        from rich.console import Group
        from rich.text import Text

        shown = (Text("\n".join(lines), STYLES[part]) for part, lines in self._parts(width))
        return Group(*shown)

    def _parts(self, width: int) -> Iterator[tuple[str, list[str]]]:
        """What each part is, and its lines. Where the last cells do not fit, each has a line of its own."""
        yield "title", [fill(line, width, INDENT) for line in self.title.splitlines()]
        cells = [(MARK if index == self.marked else "", *row) for index, row in enumerate(self.rows)]
        *columns, remarks = zip(("", *self.columns), *cells, strict=True)
        widths = [max(map(len, column)) for column in columns]
        drawn = [
            "  ".join(
                cell.ljust(wide) if at < 2 else cell.rjust(wide)
                for at, (cell, wide) in enumerate(zip(row, widths, strict=True))
            )
            for row in zip(*columns, strict=True)
        ]
        aside = len(drawn[0]) + len(INDENT) + max(map(len, remarks)) <= width
        below = " " * (sum(widths[:2]) + 2 * len(INDENT))
        for index, (line, remark) in enumerate(zip(drawn, remarks, strict=True)):
            part = "head" if index == 0 else "marked" if index - 1 == self.marked else "row"
            if aside:
                yield part, [(line + INDENT + remark).rstrip()]
            else:
                yield part, [line.rstrip(), *([fill(below + remark, width, below)] if remark else [])]
        if self.notes:
            yield "note", [fill(note, width, INDENT) for note in self.notes]

    def html(self) -> str:
        def line(cells: Sequence[str], tag: str, bold: bool = False) -> str:
            last = len(cells) - 1
            style = [f"text-align: {'left' if at in (0, last) else 'right'}" for at in range(len(cells))]
            weight = "; font-weight: bold" if bold else ""
            inner = "".join(
                f'<{tag} style="{align}{weight}">{html.escape(cell)}</{tag}>'
                for cell, align in zip(cells, style, strict=True)
            )
            return f"<tr>{inner}</tr>"

        rows = [line(row, "td", index == self.marked) for index, row in enumerate(self.rows)]
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        return (
            f"<div><b>{html.escape(self.title)}</b><table><thead>{line(self.columns, 'th')}</thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{notes}</div>"
        )
