"""``diagnose``: what is planted is found, and what only looks like it is not."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

from adamw_triton.telemetry.diagnosis import KINDS, RULES, diagnose
from adamw_triton.telemetry.observed import Observed
from adamw_triton.telemetry.report import Report
from adamw_triton_kernels.work import SKIP
from tests.telemetry.planted import IDLE, NAMES, SKIPPED, Plant, history

BEGIN, STEPS = 15, 35
"""What is planted begins so, and is to be found 20 steps later."""
BF16: dict[str, Any] = {"dtype": torch.bfloat16}
NORMS = tuple(name for name in NAMES if "norm" in name)
MATRICES = tuple(name for name in NAMES if "norm" not in name)
BLOCK = tuple(name for name in NAMES if name.startswith("blocks.2"))


def kinds(report: Report) -> list[str]:
    return [finding.kind for finding in report.findings]


def begins(names: tuple[str, ...] = NAMES, always: dict[str, Any] | None = None, **unlike: Any) -> Plant:
    """So from the step on at which it begins; ``always``: and before."""
    return lambda step, name: {**(always or {}), **(unlike if step >= BEGIN and name in names else {})}


def grown(factor: float, names: tuple[str, ...] = NAMES) -> Plant:
    """Gradients, by that factor at every step."""
    return lambda step, name: {"grad_norm": factor ** max(0, step - BEGIN + 1) if name in names else 1.0}


def grown_apart(step: int, name: str) -> dict[str, Any]:
    """All have more at last, and one grows."""
    return {"grad_norm": 3.0 ** max(0, step - 24) if name == NAMES[3] else 4.0 if step > 24 else 1.0}


class Sick(NamedTuple):
    kind: str
    plant: Plant
    tensors: tuple[str, ...] = ()
    """That are to be named; empty: all together."""
    step: int = BEGIN


NAN = {"grad_norm": math.nan, "nan_count": 7}
SICK = {
    "updates as large as weights": Sick("lr_high", begins(update_norm=5.0)),
    "a usual decay dominates": Sick("lr_high", begins(lr=0.3, update_norm=0.1, weight_norm=3.0), MATRICES),
    "no lr to speak of": Sick("lr_low", lambda step, name: {"update_norm": 1e-9}, step=1),
    "lr 0": Sick("lr_low", lambda step, name: {"lr": 0.0, "update_norm": 0.0}, step=1),
    "decay of 10": Sick("decay_strong", begins(weight_decay=10.0, update_norm=0.12), MATRICES),
    "bf16 loses most": Sick("lost_updates", begins(always=BF16, lost_share=0.9), NAMES),
    "fp16 loses most": Sick("lost_updates", begins(always={"dtype": torch.float16}, lost_share=0.6), NAMES),
    "norms in bf16 stand still": Sick("lost_updates", begins(NORMS, BF16, lost_share=1.0), NORMS),
    "all is lost": Sick("all_lost", begins(always=BF16, lost_share=1.0), NAMES),
    "all is lost, but for zeros": Sick(
        "all_lost", begins(always=BF16, lost_share=0.6, weight_norm=3.0), NAMES, BEGIN
    ),
    "a tensor is dead": Sick("dead", begins(BLOCK[:1], grad_norm=0.0), BLOCK[:1]),
    "all gradients are zero": Sick("no_gradient", begins(grad_norm=0.0)),
    "a layer has stopped": Sick("frozen", lambda s, n: IDLE if s >= BEGIN and n in BLOCK else {}, BLOCK),
    "the embedding has stopped": Sick(
        "frozen", lambda s, n: IDLE if s >= BEGIN and n == NAMES[0] else {}, NAMES[:1]
    ),
    "a layer was left out": Sick("frozen", lambda s, n: IDLE if n in BLOCK else {}, BLOCK, 1),
    "gradients grow": Sick("diverging", grown(1.5), step=BEGIN + 4),
    "gradients grow, then NaN": Sick(
        "diverging",
        lambda step, name: {"grad_norm": 9.0 ** max(0, step - 30)} if step < STEPS - 1 else NAN,
        step=31,
    ),
    "one layer's gradients grow": Sick("exploding", grown(2.0, BLOCK[:2]), BLOCK[:2], BEGIN + 5),
    "one grows, but all have more": Sick("diverging", grown_apart, step=27),
    "those of many layers grow": Sick("diverging", grown(2.0, NAMES[:5]), step=BEGIN + 3),
    "NaN in a batch": Sick("nonfinite", begins(grad_norm=math.nan, nan_count=7)),
    "one Inf": Sick("nonfinite", begins(BLOCK[1:2], grad_norm=math.inf, inf_count=1), BLOCK[1:2]),
    "a norm that overflows": Sick("nonfinite", begins(grad_norm=math.inf)),
    "one batch is skipped": Sick("nonfinite", lambda step, name: SKIPPED if step == BEGIN else {}),
    "one is skipped, of which nothing is known": Sick(
        "nonfinite", lambda step, name: {"factor": SKIP} if step == BEGIN else {}
    ),
    "v below eps": Sick("eps_floor", begins(exp_avg_sq_mean=1e-18), NAMES),
    "codes at the floor": Sick("code_floor", begins(BLOCK[1:2], {"bits": 8}, bottom_share=0.7), BLOCK[1:2]),
    "a layer without decay": Sick(
        "decay_off", lambda step, name: {"weight_decay": 0.0} if name == BLOCK[1] else {}, BLOCK[1:2], 1
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_planted(name: str) -> None:
    kind, plant, tensors, step = SICK[name]
    report = diagnose(history(STEPS, plant))
    assert kinds(report) == [kind]
    assert not report.healthy
    finding = report.findings[0]
    assert set(finding.tensors) == set(tensors)
    assert finding.step == step
    assert all(isinstance(value, (int, float)) for value in finding.numbers.values())


def test_every_kind_is_planted() -> None:
    assert {sick.kind for sick in SICK.values()} | {"ranks_differ"} == set(KINDS)
    assert {effect for rule in RULES.values() for effect in rule.leads_to} <= set(KINDS)


@pytest.mark.parametrize("name", SICK)
def test_before_it_begins(name: str) -> None:
    _, plant, _, step = SICK[name]
    assert step == 1 or diagnose(history(BEGIN - 1, plant)).healthy


def warm_up(step: int) -> float:
    return 1e-3 * step / 100


def cosine(step: int, steps: int = STEPS) -> float:
    return 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2


BASE = tuple(name for name in NAMES if "mlp" not in name)
WELL: dict[str, Plant] = {
    "as usual": lambda step, name: {},
    "warm-up from nothing": lambda step, name: {"lr": warm_up(step), "update_norm": warm_up(step) ** 3},
    "bf16 warms up": lambda s, n: {**BF16, "lr": warm_up(s), "lost_share": 1 - s / 100, "update_norm": 1e-4},
    "cosine to zero": lambda step, name: {"lr": cosine(step), "update_norm": 10 * cosine(step)},
    "cosine to zero, lost in fp32": lambda s, n: {"lr": cosine(s), "update_norm": 1e-9, "lost_share": 0.9},
    "tiny steps of exact weights": lambda s, n: {**BF16, "weights": "remainder", "update_norm": 1e-5},
    "stochastic rounding": lambda step, name: {**BF16, "weights": "stochastic", "lost_share": 0.95},
    "bf16 loses some": lambda step, name: {**BF16, "lost_share": 0.4},
    "large first steps": lambda step, name: {"update_norm": 2.0 / step},
    "a spike of four steps": lambda s, n: {"grad_norm": 1e3} if STEPS - 5 <= s < STEPS - 1 else {},
    "a spike until now": lambda s, n: {"grad_norm": 1e3} if s > STEPS - 4 else {},
    "one tensor's spike": lambda s, n: {"grad_norm": 1e3 if n == NAMES[3] and s > STEPS - 2 else 1.0},
    "gradients fall": lambda step, name: {"grad_norm": 0.9**step},
    "gradients grow from zero": lambda s, n: {"grad_norm": (s - 1.0) ** 2 if "mlp" in n else 1e3},
    "A waits for B": lambda step, name: {"grad_norm": 0.0} if step < 9 and "attention" in name else {},
    "weights grow from zero": lambda s, n: {"weight_norm": 0.01 * (s - 1)},
    "experts without tokens": lambda s, n: IDLE if "mlp" in n and (s + int(n[7])) % 4 else {},
    "the first layers are frozen": lambda s, n: IDLE if n < "blocks.2" else {},
    "the base is frozen": lambda step, name: IDLE if name in BASE else {},
    "an embedding that decays": lambda s, n: {"lr": 3e-3, "weight_norm": 99.0} if "token" in n else {},
    "norms do not decay": lambda step, name: {"weight_decay": 0.0} if "norm" in name else {},
    "one layer alone decays": lambda s, n: {} if n in BLOCK else {"weight_decay": 0.0},
    "nothing decays": lambda step, name: {"weight_decay": 0.0},
    "a bias without effect": lambda s, n: {"exp_avg_sq_mean": 1e-20} if "norm" in n else {},
    "an eps that is meant": lambda step, name: {"eps": 1e-2},
    "rare tokens in 8 bits": lambda s, n: {"bits": 8, "bottom_share": 0.8 * ("token" in n)},
    "lr is on the GPU": lambda step, name: {"lr": math.nan, "step_size": 1e-3},
    "lr is on the GPU, and warms up": lambda step, name: {
        "lr": math.nan,
        "step_size": warm_up(step),
        "update_norm": 1e-9,
    },
    "a layer without lr in bf16": lambda step, name: (
        {**BF16, "lr": 0.0, "update_norm": 0.0, "weight_norm": 10.0} if name in BLOCK else {}
    ),
    "sometimes no gradient at all": lambda step, name: IDLE if step % 3 else {},
}


@pytest.mark.parametrize("steps", [1, BEGIN, STEPS])
@pytest.mark.parametrize("name", WELL)
def test_healthy(name: str, steps: int) -> None:
    seen = history(steps, WELL[name])
    report = diagnose(seen)
    assert kinds(report) == []
    assert report.healthy == any(step.tensors for step in seen)


def both(first: Plant, second: Plant) -> Plant:
    def plant(step: int, name: str) -> dict[str, Any] | None:
        found = first(step, name), second(step, name)
        return IDLE if IDLE in found else {**found[0], **found[1]}  # type: ignore[dict-item]

    return plant


def at(begin: int, **unlike: Any) -> Plant:
    return lambda step, name: unlike if step >= begin else {}


LED: dict[str, tuple[Plant, list[tuple[str, list[str]]]]] = {
    "NaN after too large steps": (
        both(at(BEGIN, update_norm=5.0), at(30, **NAN)),
        [("lr_high", ["nonfinite"])],
    ),
    "NaN long before": (
        both(at(25, update_norm=5.0), lambda step, name: SKIPPED if step == 3 else {}),
        [("lr_high", []), ("nonfinite", [])],
    ),
    "a layer explodes, and all with it": (
        lambda s, n: {"grad_norm": 3.0 ** max(0, s - BEGIN)} if n == NAMES[3] else {},
        [("exploding", ["diverging"])],
    ),
    "lost, for the lr is low": (
        lambda step, name: {**BF16, "lost_share": 1.0, "update_norm": 1e-9},
        [("all_lost", ["lost_updates", "lr_low"])],
    ),
    "lost, for v is below eps": (
        lambda s, n: {**BF16, "lost_share": 1.0, "update_norm": 1e-9, "exp_avg_sq_mean": 1e-20},
        [("eps_floor", ["all_lost", "lost_updates", "lr_low"])],
    ),
    "two that have nothing in common": (
        both(begins(BLOCK[:1], grad_norm=0.0), begins(always=BF16, lost_share=0.9)),
        [("lost_updates", []), ("dead", [])],
    ),
}


@pytest.mark.parametrize("name", LED)
def test_one_explains_the_other(name: str) -> None:
    plant, expected = LED[name]
    report = diagnose(history(STEPS, plant))
    found = [(each.kind, sorted(effect.kind for effect in each.led_to)) for each in report.findings]
    assert found == expected


def moved(by: float, metric: str) -> list[Observed]:
    """One step as three ranks have seen it, on the last of which a tensor has another norm."""
    usual = 10.0 if metric == "weight_norm" else 1.0
    other: Plant = lambda step, name: {metric: usual * (1 + by)} if name == NAMES[3] else {}  # noqa: E731
    same: Plant = lambda step, name: {metric: usual}  # noqa: E731
    return [*history(1, same) * 2, *history(1, lambda step, name: {**same(step, name), **other(step, name)})]


@pytest.mark.parametrize("metric", ["grad_norm", "weight_norm"])
@pytest.mark.parametrize(("by", "differ"), [(0.0, False), (1e-7, False), (1e-3, True), (-0.5, True)])
def test_ranks(metric: str, by: float, differ: bool) -> None:
    report = diagnose(history(STEPS), ranks=moved(by, metric))
    assert kinds(report) == ["ranks_differ"] * differ
    assert not differ or report.findings[0].tensors == (NAMES[3],)


def test_other_steps_of_ranks_are_not_compared() -> None:
    assert diagnose(history(STEPS), ranks=[history(2)[1], moved(1.0, "grad_norm")[-1]]).healthy


def test_nothing_seen() -> None:
    report = diagnose([])
    assert not report.healthy
    assert not report.findings
    assert str(report) == "Nothing has been seen: no step has collected statistics yet."


def test_names_of_a_model() -> None:
    others = {name: f"model.{name}" for name in NAMES}
    report = diagnose(history(STEPS, SICK["a layer has stopped"].plant), names=others)
    assert report.findings[0].tensors == tuple(others[name] for name in BLOCK)


def test_places_in_a_list_are_no_layers() -> None:
    """Who passed no names has "0.3": parameters of which nothing says that they are alike."""
    places = {name: f"{index % 2}.{index // 2}" for index, name in enumerate(NAMES)}
    for name in ("a layer was left out", "a layer without decay"):
        assert diagnose(history(STEPS, SICK[name].plant), names=places).healthy
