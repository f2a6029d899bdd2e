"""Weights kept exactly or rounded stochastically, by the compiled kernels: a quick part of
``python -m bench compiled``, which has all of it. What is checked is told in `bench.compiled.checks`.
"""

from __future__ import annotations

import itertools

import pytest

from tests.compiling import in_compiling_process

KERNELS = ("32bit", "8bit 128", "32bit amsgrad", "8bit 256")
OFTEN = KERNELS[:2]
QUICK = {("remainder", True), ("stochastic", False)}
WEIGHTS = {"stochastic": "bf16", "remainder": "bf16", "master": "fp16"}
TARGETS = (90, 75)
EVERY = (75, 80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize(
    ("kernel", "weights", "aligned"),
    [
        pytest.param(
            *build,
            id="-".join(map(str, build)),
            marks=() if build[0] == "32bit" and build[1:] in QUICK else pytest.mark.slow,
        )
        for build in itertools.product(KERNELS, WEIGHTS, (True, False))
    ],
)
def test_compiled_kernels_keep_weights_as_specified(kernel: str, weights: str, aligned: bool) -> None:
    found = in_compiling_process(checked, f"{kernel} {weights}", WEIGHTS[weights], aligned)
    assert not any(found.values()), found


def checked(kernel: str, dtype: str, aligned: bool) -> dict[int, list[str]]:
    """What is wrong, by target."""
    from bench.compiled.checks import Case, check

    return {
        target: check(Case(target, kernel, dtype, dtype, aligned), quick=True).problems for target in TARGETS
    }


@pytest.mark.parametrize("kernel", OFTEN)
def test_what_goes_wrong_with_weights_is_seen(kernel: str) -> None:
    """Faults planted in the code that keeps weights: each is found, and none without."""
    found = in_compiling_process(planted, kernel)
    assert not found.pop("none")
    assert all(found.values()), found


def planted(kernel: str) -> dict[str, list[str]]:
    """What is seen of each fault."""
    import torch

    from adamw_triton_kernels.weights import ELEMENT
    from bench.compiled.comparison import Report, compare
    from bench.compiled.problems import KERNELS, Problem, ordinary, set_gradients

    def seen(weights: str, change: str, instead: str) -> list[str]:
        made = KERNELS[f"{kernel} {weights}"]
        expected = ordinary(made, torch.bfloat16, torch.bfloat16, True)
        for step in (1, 2):
            set_gradients(expected, step)
            before, ours = expected.copy(), expected.copy()
            expected.step_in_torch()
        step_with(ours, change, instead)
        report = Report()
        compare(ours, expected, before, report, "")
        return report.problems

    def step_with(problem: Problem, change: str, instead: str) -> None:
        def edit(ptx: str) -> str:
            if change not in ptx:
                raise ValueError(f"the kernel has no {change}")
            return ptx.replace(change, instead)

        problem.step_compiled(90, edit=edit)

    half, element = ", 32768;", str(ELEMENT)
    return {
        "none": seen("remainder", half, half) + seen("stochastic", element, element),
        "down instead of to nearest": seen("remainder", half, ", 0;"),
        "a little off": seen("remainder", half, ", 32000;"),
        "another dither": seen("stochastic", element, str(ELEMENT + 2**20)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kernel", OFTEN)
def test_beyond_2_to_the_32_elements(kernel: str, weights: str) -> None:
    assert in_compiling_process(huge, f"{kernel} {weights}", WEIGHTS[weights]) == []


def huge(kernel: str, dtype: str) -> list[str]:
    from bench.compiled.huge import check_huge
    from bench.compiled.problems import KERNELS
    from bench.suite import DTYPES

    return check_huge(90, KERNELS[kernel], DTYPES[dtype], DTYPES[dtype])
