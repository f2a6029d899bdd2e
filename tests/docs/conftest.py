"""The site, built once for all of its tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of ``ADAMW_TRITON_SITE``, which .ci/run has built, or one built here."""
    if "ADAMW_TRITON_SITE" in os.environ:
        return Path(os.environ["ADAMW_TRITON_SITE"])
    for module in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder
