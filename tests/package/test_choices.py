"""Arguments that are one of a few words: what signatures say is what the code knows."""

from __future__ import annotations

import typing
from typing import Any

import pytest

import adamw_triton
from adamw_triton import choices
from adamw_triton.arguments import VARIANTS
from adamw_triton.selection import selector

WORDS = {
    (adamw_triton.AdamW.__init__, "variant"): tuple(VARIANTS),
    (adamw_triton.AdamW.__init__, "transfer"): choices.TRANSFERS,
    (adamw_triton.AdamW.__init__, "prefer"): tuple(selector.PREFERENCES),
    (adamw_triton.AdamW.__init__, "nonfinite"): choices.NONFINITE,
    (adamw_triton.AdamW.__init__, "accumulate_on"): choices.ACCUMULATE_ON,
    (adamw_triton.AdamW.__init__, "master_weights"): ("auto",),
    (adamw_triton.AdamW.__init__, "stochastic_rounding"): ("auto",),
    (adamw_triton.AdamW.state_dict, "state_format"): choices.STATE_FORMATS,
    (adamw_triton.plan, "prefer"): tuple(selector.PREFERENCES),
    (adamw_triton.plan, "accumulate_on"): choices.ACCUMULATE_ON,
    (adamw_triton.plan, "sharding"): choices.SHARDINGS,
}


def words(hint: Any) -> tuple[str, ...]:
    """In a Literal, or in one of a union."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return tuple(word for each in typing.get_args(hint) for word in words(each))


@pytest.mark.parametrize(
    ("function", "argument"), WORDS, ids=lambda each: getattr(each, "__qualname__", each)
)
def test_a_signature_names_the_words_that_are_allowed(function: Any, argument: str) -> None:
    assert words(typing.get_type_hints(function)[argument]) == WORDS[function, argument]


@pytest.mark.parametrize("value", ["", "Auto", None, 1, ["auto"]])
def test_what_is_none_of_them_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid transfer: .*one of .auto., .copy., .zero_copy.$"):
        choices.check_word("transfer", value, choices.TRANSFERS)
