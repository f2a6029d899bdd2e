"""What a release is made of: one version, all packages and nothing else, pages whose links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adamw_triton

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "ARCHITECTURE.md", "README.md", "docs/support.md"]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def test_the_version_is_said_once_more_and_is_the_same() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {adamw_triton.__version__}\n" in citation
    assert f"\n## {adamw_triton.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_in_the_wheel_and_nothing_else() -> None:
    listed = (ROOT / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]
    folders = (path.parent for path in ROOT.glob("adamw_triton/**/__init__.py"))
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(re.findall(r'"([\w.]+)"', listed)) == found | {"adamw_triton_kernels"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    for target in LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), target


COMMANDS = ("ruff check .", "ruff format --check .", "mypy", "python -m build", "twine check --strict")


def test_what_contributing_says_is_what_ci_runs() -> None:
    page, ci = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        assert command in page
        assert command in ci


def test_every_row_of_the_support_table_is_one_of_four_words_and_says_where() -> None:
    lines = (ROOT / "docs" / "support.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert len(rows) > 40
    for what, word, where in rows:
        if what:
            assert word.partition(",")[0] in ("works", "compiled", "refused", "unknown"), what
            assert word == "unknown" or where, what
