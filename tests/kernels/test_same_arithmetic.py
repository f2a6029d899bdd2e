"""The same bits from every build: what compilers make of the kernels has the same multiply-adds for whole
tiles and for tails, for aligned addresses and for others, and they find nothing of their own to contract.

Without the interpreter, in a subprocess: this file as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

ROOT = Path(__file__).parents[2]
TARGETS = ["sm_75", "sm_80", "sm_90", "sm_100", "gfx942"]
SQRT = re.compile(r"MUFU\.(SQRT|RSQ)|v_(sqrt|rsq)_f32")
KINDS = {
    "fma": re.compile(r"FFMA|v_(pk_)?(fma|fmac|fmaak|fmamk|mad)_f32"),
    "mul": re.compile(r"FMUL|v_(pk_)?mul_f32"),
    "add": re.compile(r"FADD|FHADD|v_(pk_)?(add|sub|subrev)_f32"),
}
TWO = re.compile(r"FFMA2|FMUL2|FADD2|v_pk_")


def mix(opcodes: list[str]) -> dict[str, int]:
    """How many fp32 operations of each kind these instructions are."""
    counts: Counter[str] = Counter()
    for opcode in opcodes:
        for kind, pattern in KINDS.items():
            if pattern.match(opcode):
                counts[kind] += 2 if TWO.match(opcode) else 1
    return dict(sorted(counts.items()))


def compiled(build: Any, target: str, **options: Any) -> Any:
    from bench.machine_code.account import TARGETS as KNOWN
    from bench.machine_code.account import compile_for

    options = build.options(KNOWN[target].warp_size) | options
    return compile_for(build.fn, build.signature, build.constexprs, build.attrs, target, **options)


def loops(code: Any) -> list[list[str]]:
    """The opcodes of every loop with square roots in it: that of whole tiles, and that of tails."""
    blocks = code.graph.reachable()
    after = {block.index: behind(code.graph.blocks, block.index) for block in blocks}
    together = {
        frozenset(other for other in there if block in after[other]) for block, there in after.items()
    }
    found = [[line.opcode for i in loop for line in code.graph.blocks[i].instructions] for loop in together]
    return [opcodes for opcodes in found if any(map(SQRT.match, opcodes))]


def behind(blocks: list[Any], start: int) -> set[int]:
    """The blocks that control can get to from this one."""
    seen: set[int] = set()
    ahead = list(blocks[start].successors)
    while ahead:
        index = ahead.pop()
        if index not in seen:
            seen.add(index)
            ahead += blocks[index].successors
    return seen


def per_root(opcodes: list[str]) -> dict[str, float]:
    roots = sum(bool(SQRT.match(opcode)) for opcode in opcodes)
    return {kind: count / roots for kind, count in mix(opcodes).items()}


def report(target: str) -> dict[str, Any]:
    """Operations of each loop of 32-bit builds, for every root; of whole kernels, by whether compilers may
    contract multiply-adds."""
    from adamw_triton_kernels import adamw_8bit, adamw_32bit

    types = torch.bfloat16, torch.float32
    builds = {
        f"{name} {'aligned' if aligned else 'misaligned'} {dtype}": build(dtype, dtype, aligned=aligned)
        for name, build in (("32bit", adamw_32bit.build), ("8bit", adamw_8bit.build))
        for aligned in (True, False)
        for dtype in types[: 2 if name == "32bit" else 1]
    }
    return {
        "loops": {
            name: list(map(per_root, loops(compiled(build, target))))
            for name, build in builds.items()
            if name.startswith("32bit")
        },
        "kernels": {
            name: [
                mix([line.opcode for line in compiled(build, target, enable_fp_fusion=fusion).everything])
                for fusion in (False, True)
            ]
            for name, build in builds.items()
        },
    }


def launched() -> list[str]:
    """What is warned of when kernels are compiled as a launch compiles them."""
    from tests.kernels import stub

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in ("adamw_32bit", "adamw_8bit"):
            stub.launched("sm_90", name)
    return [str(warning.message) for warning in seen]


def in_a_subprocess(*arguments: str) -> Any:
    unset = ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    path = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(triton, "knobs"), reason="bench's disassembler needs Triton 3.4")
@pytest.mark.parametrize("target", TARGETS)
def test_every_loop_of_every_build_has_the_same_arithmetic(target: str) -> None:
    found = in_a_subprocess(target)
    mixes = [loop for of in found["loops"].values() for loop in of]
    assert len(mixes) == 2 * len(found["loops"]), found["loops"]
    assert all(mix == mixes[0] for mix in mixes), found["loops"]
    assert mixes[0]["fma"] > mixes[0]["mul"]
    for name, (written, contracted) in found["kernels"].items():
        assert written == contracted, name


def test_a_launch_compiles_without_a_warning() -> None:
    assert in_a_subprocess() == []


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1]) if sys.argv[1:] else launched()))
