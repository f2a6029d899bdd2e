"""The kernels compile for GPUs that are not here: every dtype pair's launch, as the launcher builds it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, torch
from adamw_triton_kernels import adamw_8bit, adamw_32bit
from bench.machine_code.account import TARGETS, compile_for

target = sys.argv[1]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
builds = [
    adamw_32bit.build(bf16, bf16),
    adamw_32bit.build(fp32, bf16, aligned=False),
    adamw_32bit.build(fp16, fp32, AMSGRAD=True),
    adamw_8bit.build(bf16, bf16),
    adamw_8bit.build(fp32, fp16, aligned=False),
    adamw_8bit.build(fp16, fp32, BLOCK=256),
]
for build in builds:
    options = build.options(TARGETS[target].warp_size)
    code = compile_for(build.fn, build.signature, build.constexprs, build.attrs, target, **options)
    assert code.threads == build.threads
    assert code.everything
    assert code.spilled_registers == 0 == code.stack_bytes, (build.constexprs, code.stack_bytes)
print("compiled", len(builds))
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton.knobs"), reason="this Triton does not name its disassemblers")
@pytest.mark.parametrize("target", ["sm_75", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, target], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled 6\n"
