"""Sharded parameters are stepped to the bits of one process: all ranks have the same batch, and there are 2
or 4 of them, so that their gradients' average is the gradient."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.once import once
from tests.distributed.ranks import together
from tests.distributed.training import Case, Run, of_cases, trained

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("ADAMW_TRITON_STEPS", "4"))
BF16, FP16 = torch.bfloat16, torch.float16
EXACT: dict[str, Any] = {"master_weights": True}
CASES = {
    "32bit": Case({"variant": "32bit"}),
    "8bit": Case({"variant": "8bit"}),
    "8bit, uneven": Case({"variant": "8bit"}, sizes={"vocab_size": 251}),
    "paged 8bit": Case({"variant": "paged_8bit"}),
    "auto": Case({"variant": "auto"}),
    "paged 32bit, exact": Case({"variant": "paged_32bit", **EXACT}, BF16),
    "8bit, exact": Case({"variant": "8bit", **EXACT}, BF16),
    "8bit, stochastic": Case({"variant": "8bit", "stochastic_rounding": True}, BF16),
    "8bit, exact, accumulated": Case({"variant": "8bit", **EXACT}, BF16, accumulation=3),
    "8bit, skipping": Case({"variant": "8bit", "nonfinite": "skip"}),
}
FP16_EXACT = Case({"variant": "8bit", **EXACT}, FP16, accumulation=3, scale=512.0)
"""Half of a small fp16 gradient is not exact, so its average differs."""
CLIPPED = {
    "32bit, clipped": Case({"variant": "32bit", "max_grad_norm": 0.5}),
    "32bit, each clipped": Case({"variant": "32bit", "max_grad_norm": 1.0, "adaptive_clip": 1.05}),
}


Runs = Callable[[str, int], dict[str, Run]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    @functools.cache
    def found(way: str, world: int) -> dict[str, Run]:
        cases = CASES | CLIPPED

        def make(_: Path) -> dict[str, Run]:
            return dict(
                zip(cases, together(world, of_cases, list(cases.values()), way, STEPS)[0], strict=True)
            )

        return once(tmp_path_factory, f"fsdp2 {way} {world}", make)

    return found


@functools.cache
def alone(name: str) -> Run:
    return trained((CASES | CLIPPED)[name], "whole", STEPS)


WAYS = [("shards", 2), ("shards", 4), ("replicas of shards", 4)]
WAYS = WAYS if "ADAMW_TRITON_STEPS" in os.environ else WAYS[::2]


@pytest.mark.parametrize(("way", "world"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_one_process(runs: Runs, name: str, way: str, world: int) -> None:
    found, expected = runs(way, world)[name], alone(name)
    assert found.losses == expected.losses
    for key, weight in expected.weights.items():
        assert torch.equal(found.weights[key], weight), key


@pytest.mark.parametrize(("way", "world"), WAYS)
@pytest.mark.parametrize("name", CLIPPED)
def test_norms_are_those_of_whole_gradients(runs: Runs, name: str, way: str, world: int) -> None:
    """But for the order of their sums; what is on several ranks counts once."""
    found, expected = runs(way, world)[name], alone(name)
    assert found.norm == pytest.approx(expected.norm, rel=1e-6)
    for key, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[key], weight, rtol=0, atol=1e-6, msg=key)


def test_fp16() -> None:
    (found,) = together(2, of_cases, [FP16_EXACT], "shards", STEPS)[0]
    assert found.losses == pytest.approx(trained(FP16_EXACT, "whole", STEPS).losses, rel=1e-4)


def test_tensor_parallel() -> None:
    """Rows of some matrices, columns of others, as torch's AdamW has them there: the forward itself adds in
    another order than one process does."""
    torchs = Case({}, optimizer=torch.optim.AdamW)
    cases = [torchs, CASES["32bit"], CASES["8bit"], CASES["paged 32bit, exact"]]
    steps = min(STEPS, 4)  # later what differs in the last bit has grown
    expected, ours, coded, exact = together(2, of_cases, cases, "tensors", steps)[0]
    for key, weight in expected.weights.items():
        torch.testing.assert_close(ours.weights[key], weight, rtol=0, atol=1e-6, msg=key)
    assert coded.losses == pytest.approx(expected.losses, rel=1e-2)
    assert exact.losses == pytest.approx(expected.losses, rel=1e-2)
