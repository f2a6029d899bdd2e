"""Pictures are what the command draws, and what they show is what the pages say."""

from __future__ import annotations

import re

import pytest

from docs import draw
from tests.docs.pages import ROOT

pytest.importorskip("transformers")


def test_pictures_are_what_is_drawn() -> None:
    for path, text in draw.pictures():
        assert path.read_text() == text, "run python -m docs.draw"


def test_no_other_pictures() -> None:
    assert {path.stem for path in draw.PICTURES.iterdir()} == set(draw.DRAWN)


def test_the_readme_says_what_the_picture_shows() -> None:
    rows = {name: sum(parts.values()) for name, parts in draw.bars().items()}
    said = re.search(r"by optimizer: ([\d.]+) GiB with paged 8-bit state", (ROOT / "README.md").read_text())
    assert said is not None
    assert said[1] == f"{rows['paged_8bit, gradient_release, exact weights']:.1f}"
    assert float(said[1]) < draw.CARD < min(value for name, value in rows.items() if "exact" not in name)


def test_released_pages_move_beside_backward() -> None:
    after, beside = draw.walked(False), draw.walked(True)
    last = max(end for _, end in after["backward"])
    assert min(begin for begin, _ in after["updates"]) >= last
    assert min(begin for begin, _ in beside["updates"]) < max(end for _, end in beside["backward"])
    assert max(b for _, b in beside["outbound"]) < max(b for _, b in after["outbound"])
