"""The site builds without a warning, and a browser opens it without an error."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
MAIN = ("docs/index", "docs/start", "docs/guides/moving", "docs/reference/optimizer", "bench/README")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")


def opened(page: Path, query: str = "", profile: Path | None = None) -> tuple[str, list[str]]:
    """What the page has become after its scripts, and what these complain of."""
    ran = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--virtual-time-budget=5000", f"--user-data-dir={profile}", "--dump-dom",
            f"{page.as_uri()}{query}",
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]


def test_pages_and_names_are_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT)).with_suffix(".html").exists()
    text = (site / "docs/reference/optimizer.html").read_text()
    for name in ("AdamW", "AdamW.stats", "plan", "param_groups", "Plan.to_dict"):
        assert f'id="adamw_triton.{name}"' in text
    assert "--lora-targets" in (site / "docs/reference/command_line.html").read_text()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in MAIN:
        text = (site / f"{page}.html").read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"([^\"]+)|<link[^>]*\bhref=\"([^\"]+)", text)
        assert loaded
        assert not [each for each in loaded if "".join(each).startswith(("http", "//"))]


@needs_browser
@pytest.mark.parametrize("page", MAIN)
def test_a_browser_has_nothing_to_complain_of(page: str, site: Path, tmp_path: Path) -> None:
    dom, complaints = opened(site / f"{page}.html", profile=tmp_path)
    assert not complaints
    assert "theme-toggle" in dom  # dark and light
    assert 'name="viewport"' in dom  # phones


@needs_browser
def test_search_finds_without_a_server(site: Path, tmp_path: Path) -> None:
    dom, complaints = opened(site / "search.html", "?q=gradient_release", tmp_path)
    assert not complaints
    assert re.search(r"full_8b_on_24gb\.html", dom)


@needs_browser
def test_a_complaint_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>missing()</script>")
    _, complaints = opened(page, profile=tmp_path / "profile")
    assert complaints
