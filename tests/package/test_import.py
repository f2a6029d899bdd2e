"""Importing the package is cheap and drags nothing along."""

from __future__ import annotations

import json
import subprocess
import sys

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


def measured() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_import_loads_nothing_heavy() -> None:
    loaded = {name.partition(".")[0] for name in measured()["new"]}  # type: ignore[attr-defined]
    assert not loaded & set(HEAVY)
    assert "adamw_triton" in loaded


def test_import_costs_under_150_ms_on_top_of_torch() -> None:
    assert min(float(measured()["seconds"]) for _ in range(3)) < 0.150  # type: ignore[arg-type]
