"""The scripts of examples/ run as they stand, on a CPU with their tiny model. That of FSDP2 is run in
tests/distributed, the notebook in tests/huggingface."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("transformers")
SCRIPTS = {"full_finetuning": (), "lora": ("peft",), "qlora": ("peft", "bitsandbytes")}
OTHERS = {"fsdp2", "model_and_text"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_learns(name: str) -> None:
    for library in SCRIPTS[name]:
        pytest.importorskip(library)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--steps", "12", "--rows", "4"]
    ran = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", ran.stdout)]
    assert len(losses) == 12
    assert min(losses[-3:]) < losses[0] - 0.3


def test_every_script_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(SCRIPTS) | OTHERS
