"""The site, built once for all of its tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.docs.pages import ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of ``ADAMW_TRITON_SITE``, which .ci/run has built, or one built here."""
    if "ADAMW_TRITON_SITE" in os.environ:
        return Path(os.environ["ADAMW_TRITON_SITE"])
    for module in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(module)
    base = tmp_path_factory.getbasetemp()
    together = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = together / "site"
    with FileLock(together / "site.lock"):  # workers of one run share it
        if not (folder / "index.html").exists():
            build(folder)
    return folder


def build(folder: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
