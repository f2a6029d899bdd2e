"""At a prompt: objects that show themselves, and sentences for what cannot be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import adamw_triton
from adamw_triton import AdamW

MODEL = nn.Linear(64, 64)

NO_PARAMETERS: list[tuple[Any, str]] = [
    (MODEL, "not a whole Linear: pass its parameters()"),
    (nn.Sequential(MODEL), "not a whole Sequential: pass its parameters()"),
    (nn.ParameterDict({"a": MODEL.weight}), "not a whole ParameterDict: pass its parameters()"),
    ("model.parameters()", r"not 'model.parameters\(\)'"),
    ("", "not ''"),
    (3, "not 3"),
    (None, "not None"),
    (MODEL.parameters, "not <bound method .*: call it"),
    ({"params": [MODEL.weight]}, r"not a mapping of \['params'\]: pass \[group\]"),
    (MODEL.state_dict(), r"not a mapping of \['weight', 'bias'\]"),
    ([MODEL], "one of the params is torch.nn.modules.linear.Linear"),
]


@pytest.mark.parametrize(("params", "message"), NO_PARAMETERS, ids=lambda each: str(each)[:30])
def test_what_are_no_parameters_gets_a_sentence(params: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        AdamW(params)


@pytest.mark.parametrize("kind", [list, iter, tuple, nn.ParameterList, lambda params: [{"params": params}]])
def test_what_are_parameters_is_taken(kind: Callable[[Any], Any]) -> None:
    optimizer = AdamW(kind([MODEL.weight, MODEL.bias]))
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert AdamW(MODEL.named_parameters()).param_groups[0]["param_names"] == ["weight", "bias"]


NO_NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"lr": "1e-3"}, "lr='1e-3'"),
    ({"lr": None}, "lr=None"),
    ({"lr": MODEL}, "lr=Linear"),
    ({"lr": [1e-3]}, r"lr=\[0.001\]"),
    ({"lr": 1j}, "lr=1j"),
    ({"eps": "x"}, "eps='x'"),
    ({"weight_decay": MODEL}, "weight_decay=Linear"),
    ({"betas": 0.9}, "betas=0.9"),
    ({"betas": ("a", 0.9)}, r"betas=\('a', 0.9\)"),
    ({"lr": "x", "eps": None}, "lr='x', eps=None"),
]


@pytest.mark.parametrize(("arguments", "named"), NO_NUMBERS, ids=str)
def test_what_are_no_numbers_is_named_alone(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=rf"hyperparameters must be numbers .*got {named}") as caught:
        AdamW(MODEL.parameters(), **arguments)
    for key in {"lr", "betas", "eps", "weight_decay"} - arguments.keys():
        assert f"{key}=" not in str(caught.value)


def stepped(**arguments: Any) -> AdamW:
    model = nn.Linear(64, 64)
    optimizer = AdamW(model.parameters(), **arguments)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    return optimizer


def test_an_optimizer_shows_its_variant_and_what_was_chosen() -> None:
    assert "variant: 8bit\n" in repr(stepped(variant="8bit"))
    assert "variant: auto (decides at the first step)\n" in repr(AdamW(MODEL.parameters()))
    optimizer = stepped()
    assert optimizer.plan is not None
    shown = repr(optimizer)
    assert f"variant: auto ({optimizer.plan.followed.label})\n" in shown
    assert shown.startswith("AdamW (")
    assert "Parameter Group 0" in shown
    assert repr(pickle.loads(pickle.dumps(optimizer))) == repr(copy.deepcopy(optimizer)) == shown


def test_a_plan_at_a_prompt_is_the_table() -> None:
    plan = stepped().plan
    assert repr(plan) == str(plan)
    assert "chosen" in repr(plan)


def test_the_package_shows_its_public_names() -> None:
    assert dir(adamw_triton) == sorted(adamw_triton.__all__)
    assert all(hasattr(adamw_triton, name) for name in dir(adamw_triton))


def test_on_a_cpu_no_staging_is_a_gpus() -> None:
    for variant in adamw_triton.arguments.VARIANTS:
        assert stepped(variant=variant).memory()["staging"] == 0
