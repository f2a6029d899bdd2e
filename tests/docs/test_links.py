"""Links between files lead to files, and their anchors to headings; without building the site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import OTHERS, PAGES, ROOT, anchors, name_of, prose

ALL = [*PAGES, *OTHERS, ROOT / "examples" / "monitoring" / "README.md", ROOT / "bench" / "README.md"]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
INDEX = ROOT / "docs" / "index.md"


def faults(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(prose(page)):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists():
            found.append(f"{target}: there is no such file")
        elif anchor and (path.suffix != ".md" or anchor not in anchors(path)):
            found.append(f"{target}: there is no such heading")
    return found


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert not faults(page)


def test_dead_ones_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One thing, `two`\n\n[a](#one-thing-two) [b](#one) [c](page.md#one-thing-two) [d](no.md)\n"
        "```\n# no heading\n[e](no.md)\n```\n[f](#no-heading)\n"
    )
    assert [fault.partition(":")[0] for fault in faults(page)] == ["#one", "no.md", "#no-heading"]


def test_every_page_is_in_the_contents() -> None:
    entries = re.findall(r"```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)```", INDEX.read_text(), re.S)
    listed = {(INDEX.parent / f"{name}.md").resolve() for each in entries for name in each.split()}
    assert {page for page in PAGES if page.is_relative_to(INDEX.parent)} - {INDEX} <= listed
    assert all(page.exists() for page in listed)
