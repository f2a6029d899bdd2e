"""A run that is killed and resumed gives the bits of one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KILLS = int(os.environ.get("ADAMW_TRITON_KILLS", "24"))
"""In all; ``ADAMW_TRITON_KILLS=100 pytest tests/checkpoint/test_kills.py`` for the full count."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_resume_with_the_same_bits() -> None:
    each = -(-KILLS // 12)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/checkpoint/crash.py"), str(each)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len({(one["variant"], one["dtype"]) for one in found}) == 12
    assert all(one["kills"] == each for one in found)
    assert all(one["runs"] >= 1 and one["equal"] == one["runs"] for one in found), found
    assert sum(one["while_saving"] for one in found) > 0, "no kill came while a checkpoint was being written"
