"""``examples/fsdp2.py``: two processes train and save, one goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def losses(ranks: int, *arguments: str) -> dict[int, float]:
    """That it prints, by step."""
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, str(ROOT / "examples" / "fsdp2.py"), *arguments]
    ran = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\S+),", ran.stdout)}


@pytest.mark.slow
def test_saved_by_two_processes_and_resumed_by_one(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    with ThreadPoolExecutor() as beside:
        one = beside.submit(losses, 1, "--steps", "12")
        begun = losses(2, "--steps", "6", "--save", saved)
        resumed = losses(1, "--steps", "12", "--resume", saved)
        alone = one.result()
    assert list(begun) == list(range(6))
    assert list(resumed) == list(range(6, 12))
    assert list(alone) == list(range(12))
    for step, loss in {**begun, **resumed}.items():
        assert loss == pytest.approx(alone[step], abs=0.005)
    assert min(resumed.values()) < begun[0] - 2
