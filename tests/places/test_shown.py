"""``optimizer.state`` is a dict like any other: whatever is moved about in it counts, as with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW

State = dict[Any, Any]
SHAPE = (80, 70)


def swap(state: State, a: Tensor, b: Tensor) -> None:
    state[a], state[b] = state[b], state[a]


def swap_in_order(state: State, a: Tensor, b: Tensor) -> None:
    """Their entries stay where they were among the values, under the other key."""
    first, second = state.pop(a), state.pop(b)
    state[b], state[a] = first, second


def rotate(state: State, *params: Tensor) -> None:
    entries = [state.pop(p) for p in params]
    for p, entry in zip([*params[1:], params[0]], entries, strict=True):
        state[p] = entry


def drop(state: State, a: Tensor, b: Tensor) -> None:
    del state[a]


def rename(state: State, a: Tensor, b: Tensor) -> None:
    state["old"] = state.pop(a)


def exchange_moments(state: State, a: Tensor, b: Tensor) -> None:
    entry = state[a]
    m, v = entry["exp_avg"], entry["exp_avg_sq"]
    state[a] = {"step": entry["step"], "exp_avg": v, "exp_avg_sq": m.abs()}


def exchange_names_in_order(state: State, a: Tensor, b: Tensor) -> None:
    entry = state[a]
    entry["exp_avg"].abs_()
    values = list(entry.values())
    entry.clear()
    entry.update(zip(("step", "exp_avg_sq", "exp_avg"), values, strict=True))


CHANGES: dict[str, Callable[..., None]] = {
    change.__name__: change
    for change in (swap, swap_in_order, rotate, drop, rename, exchange_moments, exchange_names_in_order)
}


def trained(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for scale, p in enumerate(params, 1):
            p.grad = torch.randn(p.shape, generator=generator) * scale
        optimizer.step()


@pytest.mark.parametrize("between", ["", "offload"])
@pytest.mark.parametrize("variant", ["32bit", "paged_32bit", "auto"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_moved_about_counts_as_with_torch(name: str, variant: str, between: str) -> None:
    found = []
    for make in (lambda p: AdamW(p, lr=0.01, variant=variant), lambda p: torch.optim.AdamW(p, lr=0.01)):
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(2)]
        optimizer = make(params)
        trained(optimizer, params, range(3))
        CHANGES[name](optimizer.state, *params)
        if between and isinstance(optimizer, AdamW):
            optimizer.offload()
        kept = {key: value.clone() for key, value in optimizer.state.get("old", {}).items()}
        trained(optimizer, params, range(3, 5))
        assert set(params) <= set(optimizer.state)
        for key, value in kept.items():
            assert torch.equal(optimizer.state["old"][key], value), key
        found.append([p.detach() for p in params])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["swap", "swap_in_order", "rotate", "drop"])
def test_8bit_codes_go_with_their_entry(name: str) -> None:
    """To the same bits as where all has been loaded anew."""
    found = []
    for anew in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(2)]
        optimizer = AdamW(params, lr=0.01, variant="8bit")
        trained(optimizer, params, range(3))
        CHANGES[name](optimizer.state, *params)
        if anew:
            state = optimizer.state_dict()
            optimizer = AdamW(params, lr=0.01, variant="8bit")
            optimizer.load_state_dict(state)
        trained(optimizer, params, range(3, 5))
        found.append([p.detach() for p in params])
    assert all(map(torch.equal, *found))
