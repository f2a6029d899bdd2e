"""``optim_args``: each value in its type, each mistake with its name."""

from __future__ import annotations

import subprocess
import sys
import typing
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adamw_triton
from adamw_triton.trainer_arguments import allowed_keys, optimizer_cls_and_kwargs, parse_optim_args


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("block_size=256", {"block_size": 256}),
        (" block_size = 256 , memory_budget = 4 GiB ", {"block_size": 256, "memory_budget": "4 GiB"}),
        ("memory_budget=4000000000", {"memory_budget": 4_000_000_000}),
        ("memory_budget=None,amsgrad=True", {"memory_budget": None, "amsgrad": True}),
        ("amsgrad=false", {"amsgrad": False}),
        ("transfer=zero_copy,", {"transfer": "zero_copy"}),
        ("prefer=exact", {"prefer": "exact"}),
        ("master_weights=auto,amsgrad=true", {"master_weights": "auto", "amsgrad": True}),
        ("max_grad_norm=1, nonfinite=skip", {"max_grad_norm": 1.0, "nonfinite": "skip"}),
        ("max_grad_norm=none", {"max_grad_norm": None}),
        ({"block_size": 256, "memory_budget": None}, {"block_size": 256, "memory_budget": None}),
    ],
)
def test_values_get_their_types(text: Any, expected: dict[str, Any]) -> None:
    found = parse_optim_args(text)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocksize=256", r"unknown key 'blocksize' \(=256\); allowed are amsgrad, .*block_size"),
        ("block_size=large", "block_size=large is invalid; block_size must be a whole number"),
        ("transfer=dma", "transfer=dma is invalid; transfer must be auto or copy or zero_copy"),
        ("prefer=speedy", "prefer=speedy is invalid; prefer must be speed or exact"),
        ("master_weights=2", "master_weights=2 is invalid; master_weights must be true or false or auto"),
        ("amsgrad=1", "amsgrad=1 is invalid; amsgrad must be true or false"),
        ("lr=1e-3", "lr=1e-3 does not belong there: set learning_rate"),
        ("eps=1e-6", "eps=1e-6 does not belong there: set adam_epsilon"),
        ("weight_decay=0.1", "weight_decay=0.1 does not belong there: set weight_decay of the training"),
        ("variant=8bit", "variant=8bit does not belong there: choose it by optim=, one of adamw_triton, "),
        ("block_size", "'block_size' is not key=value; expected key=value,key=value"),
        ("block_size=", "'block_size=' is not key=value"),
        ("betas=0.9,0.95", "'0.95' is not key=value"),
        ("block_size=128,block_size=256", "block_size is given twice, 128 and 256"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"optim_args: {message}"):
        parse_optim_args(text)


@pytest.mark.parametrize(("trainer", "warnings"), [(1.0, 1), (0.0, 0), (None, 0)])
def test_clipped_in_both_places(trainer: float | None, warnings: int) -> None:
    numbers = {"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    args = SimpleNamespace(
        **numbers, optim="adamw_triton", optim_args="max_grad_norm=0.5", max_grad_norm=trainer
    )
    with pytest.warns(UserWarning, match="clipped twice") if warnings else nullcontext([]) as seen:
        _, kwargs = optimizer_cls_and_kwargs(args)
    assert kwargs["max_grad_norm"] == 0.5
    assert len(seen) == warnings


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    try:
        found = parse_optim_args(text)
    except ValueError as error:
        found = {}
        message = str(error)
    else:
        message = "optim_args: read"
    assert message.startswith("optim_args: ")
    assert set(found) <= set(allowed_keys())


def test_every_argument_of_adamw_can_be_typed() -> None:
    """A keyword added to AdamW is one of ``optim_args`` without further ado, if its type can be read."""
    from adamw_triton.trainer_arguments import _READERS

    for name, kinds in allowed_keys().items():
        assert {typing.get_origin(kind) or kind for kind in kinds} <= set(_READERS), name


def given_args(**changes: Any) -> Any:
    args = {"learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}
    return SimpleNamespace(**{**args, **changes})


def test_the_pair() -> None:
    args = given_args(optim="paged_adamw_triton_8bit", optim_args="block_size=128")
    cls, kwargs = optimizer_cls_and_kwargs(args, block_size=256)
    assert cls is adamw_triton.AdamW
    assert kwargs == {
        "lr": 1e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "variant": "paged_8bit",
        "block_size": 256,
    }
    assert optimizer_cls_and_kwargs(given_args(), variant="8bit")[1]["variant"] == "8bit"
    assert optimizer_cls_and_kwargs(args, variant="8bit")[1]["variant"] == "8bit"


def test_the_pair_needs_a_variant_from_somewhere() -> None:
    with pytest.raises(
        ValueError, match=r"optim=sgd is no optimizer of adamw_triton: pass variant=, one of 'auto'"
    ):
        optimizer_cls_and_kwargs(given_args(optim="sgd"))


def test_none_of_this_needs_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; from types import SimpleNamespace as S\n"
        "from adamw_triton.trainer_arguments import optimizer_cls_and_kwargs\n"
        "args = S(learning_rate=1, adam_beta1=0, adam_beta2=0, adam_epsilon=0)\n"
        "print(optimizer_cls_and_kwargs(args, variant='8bit')[1]['variant'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8bit"
