"""A ``Report``: what stands out in the course of training, why, and what to try."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

WIDTH = 80
NAMED = 3
"""Tensors that a finding shows; ``tensors`` has all."""


@dataclass(frozen=True)
class Finding:
    """One thing that stands out."""

    kind: str
    """One of ``diagnosis.KINDS``."""
    title: str
    step: int
    """The first that showed it, of those seen."""
    tensors: tuple[str, ...]
    """Those that it is about, the worst first; empty: all together."""
    numbers: Mapping[str, float]
    """By their names in statistics, at the last step that shows it."""
    cause: str
    remedy: str
    led_to: tuple[Finding, ...] = ()
    """What else stands out, most likely because of it."""

    @property
    def measured(self) -> str:
        return ", ".join(f"{name} {_shown(value)}" for name, value in self.numbers.items())

    @property
    def where(self) -> str:
        """The first few names; empty for all."""
        more = len(self.tensors) - NAMED
        return ", ".join(self.tensors[:NAMED]) + (f" and {more} more" if more > 0 else "")

    @property
    def seen(self) -> str:
        """One line."""
        return f"{self.title}, since step {self.step}: {self.measured}"


@dataclass(frozen=True, repr=False)
class Report:
    """At a prompt and printed it is text of 80 columns; ``rich.print`` and a notebook show a table."""

    findings: tuple[Finding, ...]
    """What matters most comes first."""
    steps: tuple[int, ...]
    """That were looked at: those that collected statistics, the last of them at most."""
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Nothing stands out in what was seen, and something was seen."""
        return bool(self.steps) and not self.findings

    @property
    def title(self) -> str:
        """One line."""
        if not self.steps:
            return "Nothing has been seen: no step has collected statistics yet."
        seen = f"in {_count(len(self.steps), 'step')} seen ({self.steps[0]} to {self.steps[-1]})"
        if self.healthy:
            return f"Healthy: nothing stands out {seen}."
        verb = "stands" if len(self.findings) == 1 else "stand"
        return f"{_count(len(self.findings), 'thing')} {verb} out {seen}."

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, for logs."""
        return {
            "healthy": self.healthy,
            "steps": list(self.steps),
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return str(self)

    def _lines(self) -> Iterator[str]:
        yield from textwrap.wrap(self.title, WIDTH)
        for number, finding in enumerate(self.findings, 1):
            yield ""
            yield from _wrapped(f"{number}. ", f"{finding.title}, since step {finding.step}")
            for label, text in _details(finding):
                yield from _wrapped(f"   {label}: " if label else "   ", text)
        for note in self.notes:
            yield from _wrapped("", note)

    def __rich__(self) -> Group:
        """Needs the package rich."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(self.title, "bold green" if self.healthy else "bold red")]
        if self.findings:
            drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
            for column in COLUMNS:
                drawn.add_column(column, overflow="fold")
            for finding in self.findings:
                drawn.add_row(*map(Text, _cells(finding)))
            parts.append(drawn)
        return Group(*parts, *[Text(note, "dim") for note in self.notes])

    def _repr_html_(self) -> str:
        rows = "".join(_row(_cells(finding), "td") for finding in self.findings)
        table = f"<table><thead>{_row(COLUMNS, 'th')}</thead><tbody>{rows}</tbody></table>"
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        return f"<div><b>{html.escape(self.title)}</b>{table if rows else ''}{notes}</div>"


COLUMNS = ("what stands out", "likely cause", "what to try")


def _cells(finding: Finding) -> tuple[str, ...]:
    said = [("Since step", str(finding.step)), *_details(finding)]
    shown = [f"{label}: {text}" if label else text for label, text in said if label not in ("Likely", "Try")]
    return "\n".join([finding.title, *shown]), finding.cause, finding.remedy


def _details(finding: Finding) -> Iterator[tuple[str, str]]:
    """What is said of one, each with its label."""
    yield "", finding.measured
    if finding.where:
        yield "Where", finding.where
    yield "Likely", finding.cause
    yield "Try", finding.remedy
    for each in finding.led_to:
        yield "Led to", each.seen


def _wrapped(label: str, text: str) -> list[str]:
    indent = " " * (len(label) - len(label.lstrip()) or len(label))
    return textwrap.wrap(label + text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _row(cells: tuple[str, ...], tag: str) -> str:
    style = "text-align: left; vertical-align: top; white-space: pre-line"
    return "<tr>" + "".join(f'<{tag} style="{style}">{html.escape(cell)}</{tag}>' for cell in cells) + "</tr>"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and value < 1e9 else f"{value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
