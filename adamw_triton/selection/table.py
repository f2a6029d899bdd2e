"""A small table as text, for rich, and as HTML for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

MARK = "→"


@dataclass(frozen=True)
class Table:
    """``rows`` of cells, the first column left and the others right, the last one left again."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    marked: int | None = None
    """The row to point at."""

    def text(self) -> str:
        lines = [("", *self.columns)]
        lines += [(MARK if index == self.marked else "", *row) for index, row in enumerate(self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        last = len(widths) - 1
        drawn = [
            "  ".join(
                cell.ljust(width) if at in (0, 1, last) else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *drawn, *self.notes])

    def rich(self) -> Group:
        """Needs the package rich."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        drawn.add_column("")
        for index, column in enumerate(self.columns):
            last = index == len(self.columns) - 1
            drawn.add_column(column, justify="left" if index == 0 or last else "right", no_wrap=not last)
        for index, row in enumerate(self.rows):
            marked = index == self.marked
            cells = (Text(cell) for cell in (MARK if marked else "", *row))
            drawn.add_row(*cells, style="bold green" if marked else "")
        notes = [Text(note, "dim") for note in self.notes]
        return Group(Text(self.title, "bold"), drawn, *notes)

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
