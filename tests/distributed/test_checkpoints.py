"""State follows the shards: saved by some ranks, loaded by more or fewer, or by one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.distributed.once import once
from tests.distributed.ranks import together
from tests.distributed.saving import SAVED, gather, gathered, load, made, masters, move, save, scatter
from tests.distributed.training import Case, train

pytestmark = pytest.mark.slow

EXACT: dict[str, Any] = {"master_weights": True}
CASES = {
    "32bit": Case({"variant": "32bit"}),
    "paged 8bit": Case({"variant": "paged_8bit"}),
    "auto": Case({"variant": "auto"}),
    "8bit, exact": Case({"variant": "8bit", **EXACT}, torch.bfloat16),
    "paged 8bit, fp16 exact": Case({"variant": "paged_8bit", "adaptive_clip": 1.05, **EXACT}, torch.float16),
}
WORLDS = [1, 2, 3, 4] if "ADAMW_TRITON_STEPS" in os.environ else [1, 3]
"""Each takes seconds to begin: all with more time."""
ODD = Case({"variant": "8bit"}, sizes={"hidden_size": 96, "intermediate_size": 200, "vocab_size": 257})
"""Rows that are no whole blocks: their state has 32 bits."""


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Where four ranks saved, and what."""

    def make(folder: Path) -> tuple[str, list[dict[str, Any]]]:
        cases = [*CASES.values(), ODD]
        return str(folder), together(4, save, cases, "shards", str(folder), False)[0]

    found: tuple[str, list[dict[str, Any]]] = once(tmp_path_factory, "saved by four", make)
    return found


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


@pytest.mark.parametrize("world", WORLDS)
def test_of_four_ranks_by_any_number(of_four: tuple[str, list[dict[str, Any]]], world: int) -> None:
    """Codes too, for rows are whole blocks; where they are not, there are none."""
    folder, expected = of_four
    found = together(world, load, [*CASES.values(), ODD], "shards", folder)[0]
    coded = ["8bit" in case.arguments["variant"] and case is not ODD for case in [*CASES.values(), ODD]]
    assert [any("codes" in key for key in each) for each in expected] == coded
    for one, other in zip(found, expected, strict=True):
        check_equal(one, other)


def test_what_is_saved_while_training_goes_on(tmp_path: Path) -> None:
    cases = [CASES["paged 8bit"], CASES["8bit, exact"], ODD]
    expected = together(2, save, cases, "shards", str(tmp_path), True)[0]
    for one, other in zip(together(2, load, cases, "shards", str(tmp_path), True)[0], expected, strict=True):
        check_equal(one, other)


TORCHS = Case({}, optimizer=torch.optim.AdamW)
MOVES = {
    **{
        f"{name}, {one} to {other}": (CASES[name], one, CASES[name], other)
        for name in ("paged 8bit", "8bit, exact")
        for one, other in (("whole", "shards"), ("shards", "whole"))
    },
    "torch's to ours": (TORCHS, "shards", CASES["32bit"], "shards"),
    "ours to torch's": (CASES["32bit"], "shards", TORCHS, "shards"),
}


def test_between_shards_and_whole_parameters_and_optimizers(tmp_path: Path) -> None:
    """By what both call and shape alike, to the bit."""
    found = together(2, move, list(MOVES.values()), str(tmp_path))[0]
    for name, ((saved,), (loaded,)) in zip(MOVES, found, strict=True):
        print(name)
        check_equal(loaded, saved)


def across() -> dict[str, Any]:
    """torch's whole state dict by torch's way, which merges, and by ours."""
    model, theirs = made(TORCHS, "shards")
    train(model, theirs, range(SAVED))
    whole = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, theirs, options=whole)
    found: dict[str, Any] = {"expected": gathered(model, theirs)}
    model, ours = made(CASES["32bit"], "shards")
    set_optimizer_state_dict(model, ours, state, options=whole)
    found["into 32bit"] = gathered(model, ours)
    again = get_optimizer_state_dict(model, ours, options=whole)
    model, theirs = made(TORCHS, "shards")
    set_optimizer_state_dict(model, theirs, again, options=whole)
    found["and back"] = gathered(model, theirs)
    model, coded = made(CASES["paged 8bit"], "shards")
    found["merged"] = said(set_optimizer_state_dict, model, coded, state)
    coded.load_state_dict(state)
    found["coded"] = gathered(model, coded)
    _, undecided = made(CASES["auto"], "shards")
    undecided.load_state_dict(coded.state_dict())
    found["undecided"] = gathered(model, undecided)
    portable = coded.state_dict(state_format="portable")
    model, theirs = made(TORCHS, "shards")
    theirs.load_state_dict(portable)
    found["into 8bit"] = gathered(model, theirs)
    return found


def said(load: Any, *arguments: Any) -> str:
    try:
        load(*arguments, options=StateDictOptions(full_state_dict=True))
    except ValueError as error:
        return str(error)
    return "nothing"


def test_whole_state_dicts_of_other_variants() -> None:
    found = together(2, across)[0]
    expected = state_of(found["expected"])
    check_equal(state_of(found["into 32bit"]), expected)
    check_equal(state_of(found["and back"]), expected)
    assert "32-bit and 8-bit state at once" in found["merged"]
    assert "optimizer.load_state_dict(full), with the whole state dict on every rank" in found["merged"]
    check_equal(found["undecided"], found["coded"])
    for key, value in expected.items():
        torch.testing.assert_close(found["into 8bit"][key], value, rtol=0.1, atol=0.02 * float(value.max()))


def test_exact_weights_in_fp32() -> None:
    """To the bits of one process, out and in again, also from what somebody gathered."""
    case = CASES["8bit, exact"]
    expected = masters(case, "whole")
    model, optimizer = made(case, "whole")
    train(model, optimizer, range(SAVED))
    for whole in (None, optimizer.master_state_dict(model)):
        check_equal(together(2, masters, case, "shards", whole)[0], expected)


def test_gathered_and_handed_out_again() -> None:
    """By torch's own options, or as it is. The whole state dict is one of a single process, too."""
    cases = [*CASES.values(), ODD]
    gathered_state = together(2, gather, cases, "shards")[0]
    states = [state for state, _ in gathered_state]
    for by_torch in (True, False):
        found = together(2, scatter, cases, "shards", states, by_torch)[0]
        for one, (_, expected) in zip(found, gathered_state, strict=True):
            check_equal(state_of(one), state_of(expected))
    for case, (state, expected) in zip(cases, gathered_state, strict=True):
        model, optimizer = made(case, "whole")
        names = [name for name, _ in model.named_parameters()]
        numbered = {number: state["state"][name] for number, name in enumerate(names)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})
        for key, value in gathered(model, optimizer).items():
            if "codes" in key and key in expected:
                assert torch.equal(value, expected[key]), key


def state_of(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if "exp_avg" in key or "step" in key}
