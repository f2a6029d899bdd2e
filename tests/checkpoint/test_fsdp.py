"""FSDP (version 1) gathers optimizers' state tensor by tensor: on two ranks, and back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(
    ("variant", "use_orig_params", "kind"),
    [
        ("8bit", True, "FULL_STATE_DICT"),
        pytest.param("8bit", False, "SHARDED_STATE_DICT", marks=pytest.mark.slow),
        pytest.param("paged_8bit", True, "SHARDED_STATE_DICT", marks=pytest.mark.slow),
        pytest.param("32bit", True, "FULL_STATE_DICT", marks=pytest.mark.slow),
    ],
)
def test_state_is_gathered_and_resumed(
    variant: str, use_orig_params: bool, kind: str, tmp_path: Path
) -> None:
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    arguments = [tmp_path / "meeting", variant, str(use_orig_params), kind]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.fsdp", str(rank), *arguments],
            cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
    assert all(("decoded to fp32" in text) == ("8" in variant) for text in said)
