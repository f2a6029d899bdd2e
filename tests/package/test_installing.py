"""One place says how this is installed, and every other line follows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adamw_triton import installing

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = set(
    re.findall(
        r"^(\w+) = \[", PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
    )
)
CLONE, INDEX = ".", "adamw-triton"

# A line for whoever only uses it; `-e` is for whoever works on it, in a clone in any case.
LINE = re.compile(r'pip install (-e )?\\?["\'](\.|adamw-triton)\[([^\]{]*)\]')


def lines() -> list[tuple[Path, str, str]]:
    """Where something of ours is installed, from where, and with which extras."""
    files = [path for kind in ("*.md", "*.ipynb", "*.py") for path in ROOT.rglob(kind)]
    files = [path for path in files if not {".git", ".venv", "build"} & set(path.relative_to(ROOT).parts)]
    return [
        (path, source, extras)
        for path in files
        if path != ROOT / "adamw_triton" / "installing.py"
        for editable, source, extras in LINE.findall(path.read_text(encoding="utf-8"))
        if not editable
    ]


def test_every_line_installs_from_where_it_can_be_had() -> None:
    found = lines()
    assert {path.name for path, *_ in found} >= {"README.md", "quickstart.ipynb"}
    for path, source, extras in found:
        assert source == (INDEX if installing.PUBLISHED else CLONE), path
        assert set(extras.split(",")) <= EXTRAS, path


def test_the_package_itself_says_it_in_one_place() -> None:
    assert not [path for path, *_ in lines() if path.is_relative_to(ROOT / "adamw_triton")]


@pytest.mark.parametrize("published", [False, True])
def test_the_switch(published: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "PUBLISHED", published)
    for extra in EXTRAS:
        ((_, source, said),) = LINE.findall(installing.command(extra))
        assert (source, said) == (INDEX if published else CLONE, extra)
        assert installing.missing("rich", extra).count("\n") == 0


def test_what_is_published_says_where_its_source_is() -> None:
    assert not installing.PUBLISHED or "[project.urls]" in PYPROJECT
