"""``adaptive_clip``: AdaGC (arXiv:2502.11034), each gradient held to its own past."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.step import clipping
from adamw_triton_kernels import norms, work
from tests.optimizer.problems import bits, copies, parameters, saved, set_grads, state_bits, train

FACTOR = 1.05
WARM_UP = 4
VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")


@pytest.fixture(autouse=True)
def short_warm_up(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's 100 steps would be slow to interpret."""
    monkeypatch.setattr(norms, "WARM_UP", WARM_UP)
    if backend == "triton":
        from adamw_triton_kernels import norm_kernels

        monkeypatch.setattr(norm_kernels, "WARM_UP", WARM_UP)


def test_the_constants_are_the_papers() -> None:
    assert (work.WARM_UP, work.AVERAGE) == (100, 0.98)


def averages(optimizer: AdamW) -> list[float]:
    return [float(entry["exp_avg_norm"]) for entry in optimizer.state.values()]


def by_hand(found: Sequence[float], limits: Sequence[float] | None = None) -> Iterator[tuple[float, float]]:
    """(factor, average) of each step, in double. ``limits``: the factor of all gradients."""
    average = math.inf
    for step, norm in enumerate(found):
        own = 1.0
        if step >= WARM_UP and average < math.inf and norm > FACTOR * average:
            own = FACTOR * average / norm
        own = min(own, limits[step] if limits else 1.0)
        held = own * norm
        if held:
            if step < WARM_UP or average == math.inf:
                average = min(average, held)
            else:
                average = 0.98 * average + 0.02 * held
        yield own, average


@pytest.mark.parametrize("most", [None, 50.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_the_paper_has_it(variant: str, most: float | None) -> None:
    """Norms that rise, spike and vanish: weights and averages of a run that is clipped by hand."""
    scales = [1.0, 3.0, 0.5, 2.0, 1.0, 30.0, 0.0, 0.4, 5.0]
    params = parameters()
    others = copies(params)
    ours = AdamW(params, variant=variant, lr=0.1, adaptive_clip=FACTOR, max_grad_norm=most)
    plain = AdamW(others, variant=variant, lr=0.1)
    grads = []
    for step, scale in enumerate(scales):
        set_grads(params, step, scale)
        grads.append([p.grad.clone() for p in params])  # type: ignore[union-attr]
    found = [[float(grad.double().norm()) for grad in each] for each in grads]
    limits = [min(1.0, (most or math.inf) / (math.hypot(*each) + 1e-6)) for each in found]
    expected = [list(by_hand(column, limits)) for column in zip(*found, strict=True)]
    for step, each in enumerate(grads):
        for p, q, grad, story in zip(params, others, each, expected, strict=True):
            p.grad, q.grad = grad, grad * story[step][0]
        ours.step()
        plain.step()
        assert averages(ours) == pytest.approx([story[step][1] for story in expected], rel=1e-5)
        if "32" in variant:  # in 8 bits, the last bit of a gradient may be a code
            for p, q in zip(params, others, strict=True):
                assert torch.allclose(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_spike_in_one_tensor_leaves_the_others_alone(variant: str) -> None:
    results = []
    for spike in (1.0, 100.0):
        params = parameters()
        optimizer = AdamW(params, variant=variant, lr=0.1, adaptive_clip=FACTOR)
        before = train(optimizer, WARM_UP + 2)
        set_grads(params, 50)
        params[1].grad *= spike  # type: ignore[operator]
        optimizer.step()
        change = float((params[1].detach() - before[1]).abs().max())
        results.append((bits([*params[:1], *params[2:]]), change))
    assert results[0][0] == results[1][0]
    assert results[1][1] < 2 * results[0][1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at", [2, WARM_UP + 2])
def test_resumes_exactly(variant: str, at: int) -> None:
    steps = WARM_UP + 4
    whole = AdamW(parameters(), variant=variant, lr=0.1, adaptive_clip=FACTOR)
    expected = bits(train(whole, steps)), state_bits(whole)
    first = AdamW(parameters(), variant=variant, lr=0.1, adaptive_clip=FACTOR)
    params = [Parameter(p) for p in train(first, at)]
    second = AdamW(params, variant=variant, lr=0.1, adaptive_clip=FACTOR)
    second.load_state_dict(saved(first))
    third = copy.deepcopy(first)
    for each in (second, third):
        assert (bits(train(each, steps - at, first=at + 1)), state_bits(each)) == expected


def test_state_of_an_optimizer_without() -> None:
    """Begins to average where it is loaded; and leaves averages where they are not wanted."""
    plain, adapting = AdamW(parameters(), variant="32bit"), AdamW(parameters(), adaptive_clip=FACTOR)
    train(plain, WARM_UP + 2)
    adapting.load_state_dict(saved(plain))
    set_grads([p for group in adapting.param_groups for p in group["params"]], 1, 7.0)
    params = adapting.param_groups[0]["params"]
    adapting.step()
    assert averages(adapting) == pytest.approx([float(p.grad.norm()) for p in params])
    plain.load_state_dict(saved(adapting))
    train(plain, 1)
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in plain.state.values())
    portable = adapting.state_dict(state_format="portable")
    assert [float(entry["exp_avg_norm"]) for entry in portable["state"].values()] == averages(adapting)


@pytest.mark.parametrize("known", [True, False])
def test_a_skipped_step_teaches_nothing(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(clipping, "_arrival", lambda outcome: clipping.never)
    params = parameters()
    optimizer = AdamW(params, adaptive_clip=FACTOR, nonfinite="skip", variant="8bit")
    train(optimizer, WARM_UP + 1)
    before = bits(params), state_bits(optimizer)
    set_grads(params, 20)
    params[2].grad[1] = math.nan  # type: ignore[index]
    optimizer.step()
    assert (bits(params), state_bits(optimizer)) == before
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_averaged(bad: float) -> None:
    params = parameters()
    optimizer = AdamW(params, adaptive_clip=FACTOR, variant="32bit")
    train(optimizer, WARM_UP + 1)
    before = averages(optimizer)
    set_grads(params, 20)
    params[2].grad[1] = bad  # type: ignore[index]
    optimizer.step()
    after = averages(optimizer)
    assert after[2] == before[2]
    assert all(map(math.isfinite, after))


@pytest.mark.parametrize("value", [0, 0.9, -1, math.inf, math.nan, True, "1.05", 10**400])
def test_what_is_no_factor(value: Any) -> None:
    with pytest.raises(ValueError, match="adaptive_clip"):
        AdamW(parameters(), adaptive_clip=value)


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, "1", torch.ones(2)])
def test_what_is_no_average(value: Any) -> None:
    optimizer = AdamW(parameters(), adaptive_clip=FACTOR, variant="32bit")
    train(optimizer, 1)
    state = saved(optimizer)
    state["state"][1]["exp_avg_norm"] = value
    before = state_bits(optimizer)
    with pytest.raises(ValueError, match="parameter 1 of group 0: exp_avg_norm is"):
        optimizer.load_state_dict(state)
    assert state_bits(optimizer) == before
