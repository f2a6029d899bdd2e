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
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("adamw_triton/**/__init__.py")
    }
    assert set(re.findall(r'"([\w.]+)"', listed)) == found | {"adamw_triton_kernels"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    for target in LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_five_commands_are_those_that_ci_runs() -> None:
    page, ci = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in (
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "python -m build",
        "twine check --strict",
    ):
        assert command in page
        assert command in ci


def test_the_support_table_says_one_of_four_words() -> None:
    rows = [
        line.split("|")
        for line in (ROOT / "docs" / "support.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    for row in rows:
        if row[2].strip():
            assert row[2].split(",")[0].strip() in ("works", "compiled", "refused", "unknown"), row
            assert row[2].strip() == "unknown" or row[3].strip() or row[1].strip() == "Linux", (
                f"{row[1]}: seen where?"
            )
