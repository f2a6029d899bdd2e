"""What updates leave of themselves is what float64 makes of copies taken before, and nothing else changes."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from adamw_triton import AdamW
from adamw_triton.state.placement import SMALLEST_BUDGET
from adamw_triton.telemetry.observed import CODES, METRICS, Observed
from tests.optimizer.problems import DTYPES, parameters, saved, set_grads, train
from tests.telemetry.oracle import Watched

HOW: dict[str, dict[str, Any]] = {
    "32bit": {},
    "8bit": {"variant": "8bit"},
    "8bit 256": {"variant": "8bit", "block_size": 256},
    "paged_32bit": {"variant": "paged_32bit", "memory_budget": SMALLEST_BUDGET},
    "paged_8bit": {"variant": "paged_8bit"},
    "exact": {"master_weights": True},
    "exact 8bit, small pages": {
        "variant": "paged_8bit",
        "master_weights": True,
        "memory_budget": SMALLEST_BUDGET,
    },
    "stochastic": {"stochastic_rounding": True},
    "stochastic 8bit": {"stochastic_rounding": True, "variant": "8bit"},
    "clipped": {"max_grad_norm": 1.0},
    "clipped 8bit": {"max_grad_norm": 1.0, "variant": "8bit"},
    "skips": {"max_grad_norm": 1.0, "nonfinite": "skip", "variant": "8bit"},
    "maximizes": {"maximize": True},
}
SHAPES = ((70, 70), (5000,), (3,), (1,), (40, 2, 60), (0,), (40_000,))


@pytest.mark.bookkeeping
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_every_number(how: str, dtype: torch.dtype) -> None:
    stochastic = how.startswith("stochastic")
    if stochastic and dtype is torch.float16:
        pytest.skip("for bf16")
    params = parameters(SHAPES, dtype)
    named = [(f"layer{index}", param) for index, param in enumerate(params)]
    optimizer = AdamW(named, weight_decay=0.1, **{"variant": "32bit", "telemetry": True, **HOW[how]})
    watched = Watched(optimizer, stochastic=stochastic)
    for step in range(1, 5):
        set_grads(params, step)
        if step == 2:
            params[1].grad = None
        if step == 3:
            params[0].grad[:2, :5] = torch.nan  # type: ignore[index]
            params[-1].grad[-7:] = -torch.inf  # type: ignore[index]
        expected = watched.step()
        check(last(optimizer), expected)


def last(optimizer: AdamW) -> Observed:
    return optimizer._statistics.history()[-1]


def check(found: Observed, expected: Observed) -> None:
    assert (found.step, found.idle) == (expected.step, expected.idle)
    assert {each.name: each for each in found.tensors} == {each.name: each for each in expected.tensors}
    order = [found.tensors.index(each) for each in expected.tensors]
    for metric, values in expected.each.items():
        ours = found.each[metric][order]
        close = torch.isclose(ours, values, rtol=1e-5, atol=0.0) | ~(ours.isfinite() | values.isfinite())
        assert close.all(), (metric, ours, values)
    for metric, value in expected.total.items():
        if math.isfinite(value) or math.isfinite(found.total[metric]):
            assert found.total[metric] == pytest.approx(value, rel=1e-5), metric


def named(shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.bfloat16) -> Any:
    return [(f"layer{index}", param) for index, param in enumerate(parameters(shapes, dtype))]


@pytest.mark.bookkeeping
@pytest.mark.parametrize("how", HOW)
def test_nothing_else_changes(how: str) -> None:
    """Weights and state have the bits of steps without statistics."""

    def trained(**arguments: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        optimizer = AdamW(named(), weight_decay=0.1, **{"variant": "32bit", **HOW[how], **arguments})
        return train(optimizer, 3), saved(optimizer)["state"]

    (plain, state), (told, other) = trained(), trained(telemetry=True)
    assert all(map(torch.equal, plain, told))
    for index, entry in state.items():
        assert all(torch.equal(value, other[index][name]) for name, value in entry.items())


@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_8bit"])
def test_released_steps_say_what_ordinary_ones_do(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamw_triton.state.placement.BUCKET_BYTES", 10_000)

    def trained(**arguments: Any) -> dict[str, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 90), nn.Tanh(), nn.Linear(90, 60), nn.Tanh(), nn.Linear(60, 9))
        optimizer = AdamW(model.named_parameters(), variant=variant, telemetry=2, **arguments)
        for _ in range(4):
            model(torch.randn(8, 60)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(optimizer._statistics.history()) == 2
        return optimizer.stats(per_param=True)

    plain, released = trained(), trained(gradient_release=True)
    assert plain.keys() == released.keys()
    for key, value in plain.items():
        assert released[key] == pytest.approx(value, rel=1e-6), key


def test_every_nth_step() -> None:
    optimizer = AdamW(named(), variant="8bit", telemetry=3)
    assert optimizer.stats() == {}
    steps = []
    for step in range(1, 8):
        train(optimizer, 1, first=step)
        steps.append(optimizer.stats().get("step"))
    assert steps == [None, None, 3, 3, 3, 6, 6]
    assert {*optimizer.stats()} == {"step", *METRICS}


def test_names() -> None:
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 3))
    of_model = AdamW(model.parameters(), variant="8bit", telemetry=True)
    train(of_model, 1)
    assert of_model.stats(per_param=True)["grad_norm/0.1"] > 0
    assert of_model.stats(per_param=True, model=model)["grad_norm/0.bias"] > 0
    by_name = AdamW(model.named_parameters(), variant="8bit", telemetry=True)
    train(by_name, 1)
    found = by_name.stats(per_param=True)
    assert {key.partition("/")[2] for key in found} == {"", *dict(model.named_parameters())}
    assert {key.partition("/")[0] for key in found if key.endswith("/0.weight")} == {*METRICS}
    assert not {f"{code}/0.bias" for code in CODES} & found.keys()


def test_totals_are_those_of_all_tensors() -> None:
    optimizer = AdamW(named(), telemetry=True, variant="32bit")
    train(optimizer, 2)
    found = optimizer.stats(per_param=True)
    norms = [value for key, value in found.items() if key.startswith("grad_norm/")]
    assert found["grad_norm"] == pytest.approx(math.hypot(*norms))
    grads = [param.grad.double().flatten() for group in optimizer.param_groups for param in group["params"]]
    assert found["grad_norm"] == pytest.approx(float(torch.cat(grads).norm()), rel=1e-6)


def test_a_skipped_step_says_why() -> None:
    optimizer = AdamW(named(), variant="8bit", telemetry=True, nonfinite="skip")
    params = optimizer.param_groups[0]["params"]
    train(optimizer, 2)
    set_grads(params, 3)
    params[1].grad[17] = torch.nan
    optimizer.step()
    found = optimizer.stats(per_param=True)
    assert (found["step"], found["clip_coefficient"], optimizer.skipped_steps) == (3, 0, 1)
    assert (found["nan_count"], found["nan_count/layer1"], found["nan_count/layer0"]) == (1, 1, 0)
    assert found["update_norm"] == 0
    assert found["grad_norm/layer0"] == pytest.approx(float(params[0].grad.double().norm()), rel=1e-5)


def test_lost_updates_are_seen() -> None:
    """At 1e-6 of a weight, bf16 keeps none; exact weights keep all."""
    for exact, share in ((False, 1.0), (True, 0.0)):
        params = parameters(((4096,),), torch.bfloat16)
        with torch.no_grad():
            params[0].fill_(1.0)
        optimizer = AdamW(params, lr=1e-6, variant="8bit", master_weights=exact, telemetry=True)
        train(optimizer, 1)
        assert optimizer.stats()["lost_share"] == pytest.approx(share, abs=1e-3)
        optimizer.param_groups[0]["lr"] = 0.0
        train(optimizer, 1, first=2)
        assert optimizer.stats()["lost_share"] == 0


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "often", None])
def test_what_is_no_interval_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid telemetry: .*must be False, True"):
        AdamW(named(), telemetry=wrong)


def test_copies_and_pickles_go_on() -> None:
    optimizer = AdamW(named(), variant="8bit", telemetry=True)
    train(optimizer, 2)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.stats() == {}
        train(other, 1, first=3)
        assert other.stats()["step"] == 3
    resumed = AdamW(named(), variant="8bit", telemetry=True)
    resumed.load_state_dict(saved(optimizer))
    train(resumed, 1, first=3)
    assert resumed.stats()["step"] == 3


def test_statistics_are_only_taken_where_asked(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = AdamW(named(), variant="8bit")
    with caplog.at_level(logging.WARNING):
        train(optimizer, 2)
        assert optimizer.stats() == {}
        assert not optimizer.diagnose().findings


@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_8bit", "auto"])
def test_a_step_without_gradients_says_nothing(variant: str) -> None:
    optimizer = AdamW(named(), variant=variant, telemetry=True)
    for step in (1, 2, 3):
        train(optimizer, 1, first=2 * step)
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.stats()["grad_norm"] > 0
    assert len(optimizer.diagnose().steps) == 3


@pytest.mark.parametrize("variant", ["32bit", "8bit"])
def test_torchs_defaults_are_others(variant: str) -> None:
    dtype = torch.get_default_dtype()
    optimizer = AdamW(named(), variant=variant, telemetry=True, max_grad_norm=1.0)
    try:
        for other in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(other)
            train(optimizer, 1)
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            assert optimizer.stats(per_param=True)["grad_norm"] > 0
            assert optimizer.diagnose().steps == (1, 2, 3)
    finally:
        torch.set_default_dtype(dtype)


def test_names_of_several_models_are_told_apart() -> None:
    groups = [{"params": nn.Linear(3, 4).named_parameters()} for _ in range(2)]
    optimizer = AdamW(groups, variant="32bit", telemetry=True)
    train(optimizer, 1)
    found = optimizer.stats(per_param=True)
    assert {f"grad_norm/{group}.{name}" for group in (0, 1) for name in ("weight", "bias")} <= found.keys()


def test_an_infinite_norm_is_no_skip() -> None:
    optimizer = AdamW(named(), variant="32bit", telemetry=True, max_grad_norm=1.0)
    params = optimizer.param_groups[0]["params"]
    set_grads(params, 1)
    params[1].grad[3] = torch.inf
    optimizer.step()
    assert optimizer.diagnose().findings[0].numbers["of them skipped"] == 0
