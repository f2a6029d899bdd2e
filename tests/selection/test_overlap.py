"""How much of a step hides behind backward: the estimate, held to the pager's own schedule."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

import adamw_triton
from adamw_triton.selection.cards import find_card
from adamw_triton.selection.overlap import UTILIZATION, Pass, Run, added, describe, last_share
from adamw_triton.selection.plans import Candidate
from bench.suites import hidden
from bench.suites.limit import LLAMA_8B

CARD = find_card("RTX 4090")
FLOPS = UTILIZATION * CARD.flops


def candidate(seconds: float, host_bytes: int = 0, paged: bool = True) -> Candidate:
    return Candidate("", "", 8, paged, 0, 0, host_bytes, seconds, "")


def weights(*sizes: int, trained: bool = True) -> list[torch.Tensor]:
    made = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    return [Parameter(weight, requires_grad=trained) for weight in made]


@pytest.mark.parametrize("tokens", [2048, 4096, 8192, 32768])
def test_as_much_as_the_pagers_schedule_leaves(tokens: int) -> None:
    """Within 6% of forward and backward, of 8B with all its state paged."""
    sizes = hidden.shapes(LLAMA_8B)
    machine = next(machine for machine in hidden.MACHINES if machine.card == CARD.name)
    parts = hidden.buckets(sizes)
    alone, whole = hidden.seconds(machine, parts, tokens, released=True)
    tensors = weights(*reversed(sizes))  # as a model has them, forward's first ones first
    plan = adamw_triton.plan(tensors, "4090", "256GiB", gradient_release=True, tokens=tokens)
    paged = next(each for each in plan.candidates if each.variant == "paged_8bit" and each.budgets == (None,))
    run = Run(tokens, released=True)
    each = Pass.of(tensors, run, CARD.flops)
    assert each.seconds == pytest.approx(alone)
    assert added(paged, run, each, CARD.link, last_share(tensors)) == pytest.approx(
        whole - alone, abs=0.06 * alone
    )


def test_operations_of_a_pass() -> None:
    """Two a weight and token: forward, again with checkpointing, for inputs, and for weights that learn."""
    once = 2 * 1000 * 7 / FLOPS
    frozen, trained = weights(1000, trained=False), weights(1000)
    assert Pass.of(trained, Run(7), CARD.flops) == pytest.approx((once, 3 * once))
    assert Pass.of(trained, Run(7, checkpointing=False), CARD.flops) == pytest.approx((once, 2 * once))
    assert Pass.of(frozen, Run(7), CARD.flops) == pytest.approx((once, 2 * once))
    codes = [torch.empty(1000, dtype=torch.uint8, device="meta")]
    assert Pass.of(codes, Run(7), CARD.flops) == (0, 0)


def test_what_hides() -> None:
    each, link, gb = Pass(1.0, 3.0), 1e9, 10**9
    paged = candidate(2.0, 2 * gb)
    assert added(paged, Run(1), each, link, 0.1) == 2.0  # all of it is behind backward
    assert added(paged, Run(1, released=True), each, link, 0.1) == pytest.approx(0.2)  # the last bucket
    assert added(candidate(9.0, 9 * gb), Run(1, released=True), each, link, 0.1) == pytest.approx(6.3)
    # Updates of state that is there take the memory that backward uses.
    assert added(candidate(0.5, paged=False), Run(1, released=True), each, link, 0.1) == 0.5


def test_sums_cross_in_every_micro_batch_and_pages_in_the_last() -> None:
    each, link, gb = Pass(1.0, 3.0), 1e9, 10**9
    run = Run(1, 4, released=True, sums=5 * gb)
    found = added(candidate(22.0, 7 * gb), run, each, link, 0.0)
    assert found == pytest.approx(3 * (5 - 3) + (5 + 2 - 3))


def test_the_plan_says_it_where_tokens_are_given() -> None:
    params = weights(10**9, 10**9)
    silent = adamw_triton.plan(params, "4090", "64GiB", gradient_release=True)
    said = adamw_triton.plan(params, "4090", "64GiB", gradient_release=True, tokens=4096)
    assert said.notes[: len(silent.notes)] == silent.notes
    assert said.chosen
    assert said.notes[-1] == describe(said.chosen, params, Run(4096, released=True), CARD)
    assert "1 x 4,096 tokens take about" in said.notes[-1]
    unnamed = adamw_triton.plan(params, "24GiB", "64GiB", tokens=4096)
    assert "not known: name the card" in unnamed.notes[-1]


@pytest.mark.parametrize("tokens", [0, -1, True, 2.5])
def test_tokens_that_cannot_be(tokens: object) -> None:
    with pytest.raises(ValueError, match="Invalid tokens"):
        adamw_triton.plan(weights(10), "4090", "1GiB", tokens=tokens)  # type: ignore[arg-type]
