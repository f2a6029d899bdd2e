"""The pages of docs/ and the README, taken apart: code blocks and headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [page for page in PAGES if "build" not in page.relative_to(ROOT).parts]
OTHERS = [ROOT / name for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>\w+) -->\n)?```(?P<kind>[\w{}-]*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    page: Path
    line: int
    """Of the page, at which its text begins."""
    kind: str
    mark: str
    """``gpu``: it needs one; ``prints``: it is what the command before prints; else empty."""
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, at.start("text")) + 1, at["kind"], at["mark"] or "", at["text"])
        for at in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """Without code."""
    return re.sub(r"`[^`\n]+`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them and MyST after it."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (each := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(each)
    return found
