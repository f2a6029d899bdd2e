"""Importing the package is cheap and drags nothing along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HEAVY = ("triton", "transformers", "matplotlib", "rich", "bitsandbytes")

MEASURE = """
import json, sys, time, torch
known = set(sys.modules)
start = time.process_time()  # not what other processes take
import adamw_triton
adamw_triton.AdamW
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "new": sorted(set(sys.modules) - known)}))
"""


def measured(cache: Path) -> dict[str, object]:
    """As it is where it has been installed, and has bytecode from the second time on."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = {name.partition(".")[0] for name in measured(tmp_path)["new"]}  # type: ignore[attr-defined]
    assert not loaded & set(HEAVY)
    assert "adamw_triton" in loaded


def test_import_costs_under_100_ms_on_top_of_torch(tmp_path: Path) -> None:
    assert min(float(measured(tmp_path)["seconds"]) for _ in range(4)) < 0.100  # type: ignore[arg-type]
