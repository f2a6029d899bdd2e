"""State out and in: exact, all or nothing, and whoever moved its tensors in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from tests.optimizer.problems import DTYPES, bits, copies, parameters, saved, set_grads, state_bits, train

VARIANTS = ("32bit", "8bit")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_gives_the_same_bits(variant: str, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    optimizer = AdamW(params, lr=1e-2, variant=variant)
    train(optimizer, 3)
    twin = copies(params)
    resumed = AdamW(twin, lr=7.0, variant=variant)
    resumed.load_state_dict(saved(optimizer))
    assert resumed.param_groups[0]["lr"] == 1e-2
    assert state_bits(resumed) == state_bits(optimizer)
    assert bits(train(resumed, 3, first=4)) == bits(train(optimizer, 3, first=4))
    assert state_bits(resumed) == state_bits(optimizer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_into_other_groups_gives_the_same_bits(variant: str) -> None:
    """However the buffers are laid out: resumed as two optimizers, the second half first."""
    params = parameters()
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:]}], variant=variant)
    train(optimizer, 2)
    twin = copies(params)
    resumed = AdamW([{"params": twin[:2]}, {"params": twin[2:]}], variant=variant)
    set_grads(twin[4:], 0)
    resumed.state[twin[4]]  # an empty entry must not disturb either
    resumed.load_state_dict(saved(optimizer))
    assert bits(train(resumed, 2, first=3)) == bits(train(optimizer, 2, first=3))


def test_the_tensors_of_a_state_dict_are_not_shared_with_another_optimizer() -> None:
    optimizer = AdamW(parameters())
    train(optimizer, 1)
    twin = AdamW(parameters())
    twin.load_state_dict(optimizer.state_dict())
    before = state_bits(optimizer)
    train(twin, 2, first=2)
    assert state_bits(optimizer) == before


@pytest.mark.parametrize(("source", "target"), [("32bit", "8bit"), ("8bit", "32bit")])
def test_the_other_variant_loads(source: str, target: str) -> None:
    params = parameters()
    optimizer = AdamW(params, variant=source)
    train(optimizer, 20)
    twin = copies(params)
    other = AdamW(twin, variant=target)
    other.load_state_dict(saved(optimizer))
    before = copies(params)
    a, b = (train(o, 1, first=21) for o in (optimizer, other))
    for start, x, y in zip(before, a, b, strict=True):
        assert (x - y).norm() <= 0.05 * (x - start).norm()
    assert all(float(entry["step"]) == 21 for entry in other.state.values())


@pytest.mark.parametrize("sizes", [(128, 256), (256, 128)], ids=str)
def test_another_block_size_loads(sizes: tuple[int, int]) -> None:
    params = parameters()
    optimizer = AdamW(params, variant="8bit", block_size=sizes[0])
    train(optimizer, 20)
    other = AdamW(copies(params), variant="8bit", block_size=sizes[1])
    other.load_state_dict(saved(optimizer))
    before = copies(params)
    a, b = (train(o, 1, first=21) for o in (optimizer, other))
    for start, x, y in zip(before, a, b, strict=True):
        assert (x - y).norm() <= 0.05 * (x - start).norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_that_somebody_replaced_is_taken_over(variant: str) -> None:
    """Lightning moves every tensor in ``state`` after loading; others fill it in by hand."""
    params = parameters()
    optimizer = AdamW(params, variant=variant)
    train(optimizer, 2)
    twin = copies(params)
    touched = AdamW(twin, variant=variant)
    touched.load_state_dict(saved(optimizer))
    for entry in touched.state.values():
        for key, value in entry.items():
            entry[key] = value.clone()
    assert bits(train(touched, 2, first=3)) == bits(train(optimizer, 2, first=3))


def test_deleted_state_begins_anew() -> None:
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, 2)
    del optimizer.state[params[0]]
    train(optimizer, 1, first=3)
    assert float(optimizer.state[params[0]]["step"]) == 1
    assert float(optimizer.state[params[1]]["step"]) == 3
    optimizer.state.clear()
    train(optimizer, 1, first=4)
    assert all(float(entry["step"]) == 1 for entry in optimizer.state.values())


def test_load_hooks_of_the_user_see_and_replace_the_state() -> None:
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, 2)
    twin = AdamW(copies(params))
    seen = []

    def forget_the_first(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(sorted(state_dict["state"][0]))
        return {**state_dict, "state": {k: v for k, v in state_dict["state"].items() if k != 0}}

    twin.register_load_state_dict_pre_hook(forget_the_first)
    twin.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    twin.load_state_dict(saved(optimizer))
    assert seen == [["exp_avg", "exp_avg_sq", "step"], "after"]
    assert len(twin.state) == len(params) - 1


# --- Bad input: the parameter is named, and nothing has changed -------------------------------------------


def _entry(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def spoil(state_dict: dict[str, Any]) -> None:
        change(state_dict["state"][1])

    return spoil


def _swap_shape(entry: dict[str, Any]) -> None:
    key = "exp_avg" if "exp_avg" in entry else "exp_avg_codes"
    entry[key] = entry[key][:-1]


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "shape": (_entry(_swap_shape), r"parameter 1 of group 0: exp_avg\w* has shape \(4999,\).*\(5000,\)"),
    "no tensor": (_entry(lambda e: e.update({k: 1.0 for k in e if "sq" in k})), "parameter 1 of group 0"),
    "missing": (_entry(lambda e: e.pop(sorted(e)[0])), "parameter 1 of group 0 has entries"),
    "SGD's": (_entry(lambda e: (e.clear(), e.update(momentum_buffer=torch.zeros(5000)))), "momentum_buffer"),
    "too few": (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size"),
    "no groups": (lambda d: d.pop("param_groups"), "param_groups"),
}


@pytest.mark.parametrize("kind", BAD_STATES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_state_dict_changes_nothing(variant: str, kind: str) -> None:
    spoil, message = BAD_STATES[kind]
    optimizer = AdamW(parameters(), lr=0.125, variant=variant)
    train(optimizer, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["lr"] = 9.0
    for entry in state_dict["state"].values():
        entry["step"] = torch.tensor(77.0)
    spoil(state_dict)
    before = state_bits(optimizer)
    with pytest.raises((ValueError, KeyError), match=message):
        optimizer.load_state_dict(state_dict)
    assert state_bits(optimizer) == before
    assert optimizer.param_groups[0]["lr"] == 0.125
    twin = AdamW(copies(optimizer.param_groups[0]["params"]), lr=0.125, variant=variant)
    twin.load_state_dict(optimizer.state_dict())
    assert bits(train(twin, 1)) == bits(train(optimizer, 1))


def test_8bit_codes_of_another_dtype_are_refused() -> None:
    """torch's own loader casts them to the parameter's dtype, silently; some tool may have."""
    optimizer = AdamW(parameters(), variant="8bit")
    train(optimizer, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][1]["exp_avg_codes"] = state_dict["state"][1]["exp_avg_codes"].float()
    with pytest.raises(ValueError, match=r"exp_avg_codes has dtype torch.float32, expected torch.int8"):
        optimizer.load_state_dict(state_dict)


# --- Memory order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_layout", ["same", "other"])
@pytest.mark.parametrize("kind", ["transposed", "permuted", "with gaps"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_strides_are_updated_exactly(variant: str, kind: str, grad_layout: str) -> None:
    """As a contiguous parameter in the same order of memory goes."""
    values = torch.randn(20, 30, 15, generator=torch.Generator().manual_seed(0))
    order = {"transposed": (2, 0, 1), "permuted": (1, 2, 0), "with gaps": (0, 1, 2)}[kind]
    back = tuple(order.index(i) for i in range(3))
    straight = Parameter(values.permute(order).contiguous())
    if kind == "with gaps":
        memory = torch.full((20, 30, 31), 7.0)
        strided = Parameter(memory[:, :, 1::2].copy_(values))
    else:
        strided = Parameter(values.permute(order).contiguous().permute(back))
    assert not strided.is_contiguous()
    ours, theirs = AdamW([strided], variant=variant), AdamW([straight], variant=variant)
    for step in range(1, 4):
        set_grads([straight], step)
        assert straight.grad is not None
        grad = straight.grad.permute(back)
        strided.grad = grad.clone() if grad_layout == "same" else grad.contiguous()
        ours.step()
        theirs.step()
    assert bits([strided.detach().permute(order)]) == bits([straight])
    if kind == "with gaps":
        assert (memory[:, :, ::2] == 7).all()
    state_dict = copy.deepcopy(ours.state_dict())
    resumed = AdamW([Parameter(strided.detach().clone())], variant=variant)
    resumed.load_state_dict(state_dict)
    assert state_bits(resumed) == state_bits(ours)
