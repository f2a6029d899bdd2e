"""Two processes train with paged state at once, on one GPU, and each gets the bits that it gets alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adamw_triton.state import placement
from tests.paging.two import trained

ROOT = Path(__file__).parents[2]
CASES = [
    ("cpu", "paged_8bit"),
    pytest.param("cuda", "paged_8bit", marks=pytest.mark.gpu),
    pytest.param("cuda", "paged_32bit", marks=pytest.mark.gpu),
]


def start(device: str, variant: str, seed: int) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.paging.two", device, variant, str(seed)],
        cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("device", "variant"), CASES)
def test_two_processes_at_once_get_the_bits_of_one_alone(
    device: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", placement.PAGE_BYTES)  # `trained` sets it
    pair = [start(device, variant, seed) for seed in (1, 2)]
    try:
        for process in pair:  # both have taken a step, and go on together
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in pair:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        digests = [process.communicate(timeout=120)[0].strip() for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert digests == [trained(device, variant.removeprefix("paged_"), seed) for seed in (1, 2)]
    assert digests[0] != digests[1]
