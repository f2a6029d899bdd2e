"""The tests of what depends on transformers, with its other versions.

``.ci/run`` installs each into a folder of its own and names the folders in ``ADAMW_TRITON_TRANSFORMERS``,
with ``:`` between them. Here each is put in front of what is installed, for a pytest of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

HERE = Path(__file__).parent
DEPENDENT = (
    "test_strings.py",
    "test_trainer.py",
    "test_callback.py",
    "test_masters.py",
    "test_the_version.py",
)
VARIABLE = "ADAMW_TRITON_TRANSFORMERS"
FOLDERS = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder",
    FOLDERS or [pytest.param("", marks=pytest.mark.skip(reason=f"{VARIABLE} names no other transformers"))],
)
def test_another_transformers(folder: str) -> None:
    paths = (folder, os.environ.get("PYTHONPATH", ""))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "ADAMW_TRITON_EXPECTED": folder,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(HERE / name) for name in DEPENDENT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in "".join(last)
