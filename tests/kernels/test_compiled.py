"""The compiled kernels, run without a GPU: a quick part of ``python -m bench compiled``, which has all of it.

What is checked of each is told in `bench.compiled.checks`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.amount import some
from tests.compiling import in_compiling_process

KERNELS = ("32bit", "32bit amsgrad", "8bit 128", "8bit 256")
PAIRS = (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "fp16"), ("fp16", "bf16"))
"""Pairs that differ in code: of one width; no conversions; narrower gradients; other conversions."""
WIDTHS = (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "fp16"), ("bf16", "fp32"))
"""Pairs that differ in what they move."""
TARGETS = (75, 80, 86, 89, 90, 100, 120)
SPILLS = some(TARGETS, KERNELS, WIDTHS, (True, False), together=3)
"""Builds that are looked at for spills: each for some targets, half of them for each."""

ROOT = Path(__file__).parents[2]
OPTIMIZERS = {
    "sm_75": "tests/optimizer/test_checkpoint.py::test_resuming_gives_the_same_bits",
    "sm_80": "tests/optimizer/test_capturable.py::test_replays_count_and_see_learning_rates",
    "sm_90": "tests/paging/test_bits.py::test_one_tensor_over_many_pages[5000-8bit]",
    "sm_100": "tests/optimizer/test_compiled.py",
    "sm_120": "tests/optimizer/test_statistics.py::test_released_steps_say_what_ordinary_ones_do",
}
"""Tests of the optimizer's own: steps after loading, in graphs, over pages, beside torch; statistics."""
TRITONS = list(filter(None, os.environ.get("ADAMW_TRITON_TRITONS", "").split(os.pathsep)))
"""Folders with other releases of Triton."""


QUICK = {("32bit", True), ("32bit", False), ("8bit 128", False)}


def _builds() -> Iterator[object]:
    for kernel in KERNELS:
        for param, grad in PAIRS:
            for aligned in (True, False):
                name = f"{kernel}-{param}-{grad}-{'aligned' if aligned else 'misaligned'}"
                quick = (param, grad) == PAIRS[0] and (kernel, aligned) in QUICK
                marks = () if quick else pytest.mark.slow
                yield pytest.param(kernel, param, grad, aligned, id=name, marks=marks)


@pytest.mark.parametrize(("kernel", "param", "grad", "aligned"), list(_builds()))
def test_compiled_kernels_do_what_is_specified(kernel: str, param: str, grad: str, aligned: bool) -> None:
    """For every target."""
    found = in_compiling_process(checked, kernel, param, grad, aligned)
    assert list(found) == [f"sm_{one}" for one in TARGETS]
    assert not any(found.values()), found


def checked(kernel: str, param: str, grad: str, aligned: bool) -> dict[str, list[str]]:
    """What is wrong, by target. Targets whose code is the same are run once."""
    from bench.compiled.checks import CAPABILITIES, Case, check
    from bench.compiled.problems import ordinary

    known: dict[tuple[str, ...], list[str]] = {}
    found = {}
    for capability in CAPABILITIES:
        case = Case(capability, kernel, param, grad, aligned)
        session = ordinary(*case.of, aligned).step_compiled(capability, only=())
        code = tuple(_instructions(each.ptx) for each in session.kernels)
        if code not in known:
            known[code] = check(case, quick=True).problems
        found[f"sm_{capability}"] = known[code]
    return found


def _instructions(ptx: str) -> str:
    """Without comments, lines of the source, and the target."""
    return re.sub(r"//[^\n]*|^\s*\.(?:loc|target|version|file)\b[^\n]*", "", ptx, flags=re.M)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_build_spills(target: int) -> None:
    assert in_compiling_process(spilling, target) == {}


def spilling(target: int) -> dict[str, str]:
    """Builds whose machine code keeps registers in memory, and its accesses. Of those that keep weights
    otherwise than to nearest, some do (8 bytes, in a few pairs of dtypes): `bench compiled` lists them."""
    from bench.compiled.assembled import assembled
    from bench.compiled.checks import Case

    cases = [Case(target, kernel, *pair, aligned) for of, kernel, pair, aligned in SPILLS if of == target]
    return {str(case): found for case in cases if (found := assembled(case).local)}


@functools.cache
def counted(pair: tuple[str, str]) -> dict[tuple[str, bool, bool], tuple[float, float, float]]:
    """(kernel, aligned, tail) -> of an element on sm_90: PTX instructions, bytes of sectors, bytes wanted."""
    from bench.compiled.work import measure

    return {
        (kernel, aligned, tail): (found.instructions, found.moved, found.wanted)
        for kernel in KERNELS
        for aligned in (True, False)
        for tail in (False, True)
        for found in (measure(90, kernel, *pair, aligned=aligned, tail=tail),)
    }


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id="-".join(pair), marks=pytest.mark.slow if n else ())
        for n, pair in enumerate(WIDTHS)
    ],
)
def test_the_work_of_an_element(pair: tuple[str, str]) -> None:
    """Aligned whole tiles: a little above what is counted today, and far below what a lost vector access
    would cost. Misaligned whole tiles: at most twice their sectors. Tails: at most twice their instructions.
    """
    found = in_compiling_process(counted, pair)
    for kernel in KERNELS:
        instructions, moved, wanted = found[kernel, True, False]
        assert instructions < (80 if kernel.startswith("8bit") else 45), kernel
        assert moved < 1.6 * wanted, kernel
        assert found[kernel, False, False][1] < 2 * moved, kernel
        for aligned in (True, False):
            assert found[kernel, aligned, True][0] < 2 * instructions, (kernel, aligned)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_beyond_2_to_the_32_elements(kernel: str) -> None:
    assert in_compiling_process(huge, kernel) == []


def huge(kernel: str) -> list[str]:
    import torch

    from bench.compiled.huge import check_huge
    from bench.compiled.problems import KERNELS

    return check_huge(90, KERNELS[kernel], torch.bfloat16, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("target", OPTIMIZERS)
def test_the_optimizer_on_compiled_kernels(target: str) -> None:
    """``ADAMW_TRITON_COMPILED=sm_90 python -m pytest tests/optimizer`` does so with all of its tests."""
    printed = alone(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", OPTIMIZERS[target]], ADAMW_TRITON_COMPILED=target
    )
    assert " passed" in printed
    assert " skipped" not in printed


def alone(command: list[str], **environment: str) -> str:
    """What a Python that does not interpret kernels prints."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    inherited.pop("TRITON_INTERPRET", None)
    path = [environment.pop("before", ""), str(ROOT), str(ROOT / "kernels"), inherited.get("PYTHONPATH", "")]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not TRITONS, reason="ADAMW_TRITON_TRITONS names no folder")
@pytest.mark.parametrize("folder", TRITONS)
def test_other_releases_of_triton(folder: str) -> None:
    program = """
import json
from tests.kernels.test_compiled import checked
builds = ("8bit 128", "bf16", "bf16", True), ("32bit", "fp32", "fp16", False)
print(json.dumps([checked(*build) for build in builds]))
"""
    found = json.loads(alone(["-c", program], before=folder).splitlines()[-1])
    assert not any(problems for of_build in found for problems in of_build.values()), found
