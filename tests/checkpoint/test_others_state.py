"""What others keep in ``optimizer.state``: it goes wherever torch.optim.AdamW's would, and harms nothing."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.checkpoint import files
from adamw_triton.checkpoint.conversion import convert
from adamw_triton.checkpoint.files import CheckpointError
from tests.optimizer.problems import bits, parameters, set_grads, train

VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit", "auto")
SHAPES = ((70, 70), (3,), (5,))
Optimizer = torch.optim.Optimizer


class Kept(NamedTuple):
    name: str
    count: int


IN_ENTRIES: dict[Any, Callable[[], Any]] = {
    "slow_weights": lambda: torch.full((70, 70), 0.3),
    "float64": lambda: torch.ones(2, dtype=torch.float64),
    "count": lambda: torch.tensor([3]),
    "half": lambda: torch.ones(2, dtype=torch.float16),
    "text": lambda: "a text",
    "nothing": lambda: None,
    "nested": lambda: {"list": [torch.ones(2), 1], "tuple": (torch.zeros(1), "x"), 3: Kept("a", 1)},
    5: lambda: torch.arange(3),
    ("a", 1): lambda: 2.5,
    "momentum_buffer": lambda: torch.ones(3),  # SGD's, were it alone
}
UNDER_KEYS: dict[Any, Callable[[], Any]] = {
    "wrapper": lambda: {"scale": torch.ones(3)},
    "tensor": lambda: torch.ones(2),
    "number": lambda: 3,
    "list": lambda: [torch.ones(1), "x"],
    77: lambda: {"ema": 0.5},
    (1, 2): lambda: None,
}


def put(optimizer: Optimizer, where: str, key: Any) -> None:
    if where == "entry":
        optimizer.state[first(optimizer)][key] = IN_ENTRIES[key]()
    else:
        optimizer.state[key] = UNDER_KEYS[key]()


def first(optimizer: Optimizer) -> Tensor:
    param: Tensor = optimizer.param_groups[0]["params"][0]
    return param


def kept(optimizer: Optimizer, where: str, key: Any) -> Any:
    return optimizer.state[first(optimizer)][key] if where == "entry" else optimizer.state[key]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype is b.dtype and bits([a]) == bits([b])
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def reloaded(optimizer: AdamW, state_format: str = "native") -> AdamW:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(state_format=state_format), file)
    file.seek(0)
    params = [Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    other = AdamW(params, variant=optimizer.variant)
    other.load_state_dict(torch.load(file, weights_only=False))
    return other


def pickled(optimizer: AdamW) -> AdamW:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    made: AdamW = torch.load(file, weights_only=False)
    return made


def step(optimizer: AdamW) -> AdamW:
    train(optimizer, 1, first=2)
    return optimizer


def offload(optimizer: AdamW) -> AdamW:
    optimizer.offload()
    optimizer.reload()
    return optimizer


def widen(optimizer: AdamW) -> AdamW:
    """All get new places."""
    optimizer.param_groups[0]["state_bits"] = 40 - (8 if "8" in optimizer.variant else 32)
    return step(optimizer)


def spill(optimizer: AdamW) -> AdamW:
    optimizer._spill(torch.device("cpu"), 1 << 40)
    return step(optimizer)


OPERATIONS: dict[str, Callable[[AdamW], AdamW]] = {
    "step": step,
    "offload": offload,
    "other bits": widen,
    "spill": spill,
    "native": reloaded,
    "portable": lambda optimizer: reloaded(optimizer, "portable"),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "its own": lambda optimizer: (optimizer.load_state_dict(optimizer.state_dict()), optimizer)[1],
}
CASES = [("entry", key) for key in IN_ENTRIES] + [("key", key) for key in UNDER_KEYS]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_kept_and_nothing_else_changes(variant: str, operation: str) -> None:
    def run(put_in: bool) -> AdamW:
        optimizer = AdamW(parameters(SHAPES), variant=variant)
        train(optimizer, 1)
        for where, key in CASES if put_in else ():
            put(optimizer, where, key)
        return OPERATIONS[operation](optimizer)

    with_it, without = run(True), run(False)
    for where, key in CASES:
        expected = IN_ENTRIES[key]() if where == "entry" else UNDER_KEYS[key]()
        found = kept(with_it, where, key)
        # torch's loading makes every tensor of a parameter's entry of its dtype, and so do we.
        loads = operation in ("native", "portable", "its own") and where == "entry"
        assert same(found, as_fp32(expected) if loads else expected), (where, key)
    assert bits(train(with_it, 2, first=3)) == bits(train(without, 2, first=3))


def as_fp32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, dict):
        return {key: as_fp32(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(as_fp32, value))
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_it_is_loaded_as_torch_loads_it(dtype: torch.dtype) -> None:
    found = []
    for make in (torch.optim.AdamW, AdamW):
        optimizer = make(parameters(SHAPES, dtype))
        train(optimizer, 1)
        for where, key in CASES:
            if key not in ("text", "nested"):  # torch makes a generator's name of a text
                put(optimizer, where, key)
        state_dict = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state_dict)
        found.append([kept(optimizer, where, key) for where, key in CASES if key not in ("text", "nested")])
    assert all(map(same, *found))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_there_before_any_step(variant: str) -> None:
    """Lookahead puts its slow weights there at once."""
    optimizer, plain = (AdamW(parameters(SHAPES), variant=variant) for _ in range(2))
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param]["slow_weights"] = param.detach().clone()
    again = AdamW(parameters(SHAPES), variant=variant)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = bits(train(plain, 2))
    assert bits(train(optimizer, 2)) == bits(train(again, 2)) == expected
    assert all("slow_weights" in entry and "step" in entry for entry in again.state.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_that_changes_at_every_step_costs_no_new_launches(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = AdamW(parameters(SHAPES), variant=variant)
    train(optimizer, 1)
    monkeypatch.setattr("adamw_triton.places.store.Store.reserve", None)
    for number in range(2, 5):
        optimizer.state[first(optimizer)]["slow"] = torch.ones(1)
        optimizer.state["wrapper"] = number
        train(optimizer, 1, first=number)


# --- A state that is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["none", *OPERATIONS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_the_state_of_a_parameter_without_any(variant: str, operation: str) -> None:
    optimizer = AdamW(parameters(SHAPES), variant=variant)
    *trained, frozen = optimizer.param_groups[0]["params"]
    frozen.requires_grad_(False)
    set_grads(trained, 1)
    optimizer.step()
    optimizer.state[frozen]
    if operation not in ("none", "step", "other bits", "spill"):
        optimizer = OPERATIONS[operation](optimizer)
    frozen = optimizer.param_groups[0]["params"][-1]
    assert isinstance(optimizer.state, defaultdict)
    assert len(optimizer.state[frozen]) == 0
    before = optimizer.memory()
    set_grads(optimizer.param_groups[0]["params"][:-1], 2)
    optimizer.step()
    assert len(optimizer.state[frozen]) == 0
    if operation == "none":
        assert optimizer.memory() == before


# --- What somebody put in the place of ours ---------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, [], 3, {"step": 1}, {"exp_avg": torch.ones(3)}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_cannot_be_taken_over_is_refused_before_anything_is_written(variant: str, thing: Any) -> None:
    optimizer = AdamW(parameters(SHAPES), variant=variant)
    train(optimizer, 1)
    twin = copy.deepcopy(optimizer)
    param, other = optimizer.param_groups[0]["params"][:2]
    own = optimizer.state[other]
    optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
    optimizer.state[other] = thing
    before = bits([param, other])
    set_grads(optimizer.param_groups[0]["params"], 2)
    with pytest.raises(ValueError, match="state of parameter 1 of group 0"):
        optimizer.step()
    assert bits([param, other]) == before
    optimizer.state[other] = own
    assert bits(train(optimizer, 1, first=2)) == bits(train(twin, 1, first=2))


@pytest.mark.parametrize("variant", ["32bit", "8bit"])
def test_two_entries_exchanged_by_hand(variant: str) -> None:
    optimizer = AdamW(parameters(((70, 70), (70, 70))), variant=variant)
    train(optimizer, 2)
    a, b = optimizer.param_groups[0]["params"]
    before = [bits(list(optimizer.state[p].values())) for p in (a, b)]
    optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]
    optimizer.offload()
    assert [bits(list(optimizer.state[p].values())) for p in (b, a)] == before


# --- convert ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["native", "portable", "torch"])
def test_convert_keeps_it_where_the_file_can(to: str, tmp_path: Path) -> None:
    optimizer = AdamW(parameters(SHAPES), variant="8bit")
    train(optimizer, 1)
    put(optimizer, "entry", "slow_weights")
    optimizer.state[optimizer.param_groups[0]["params"][2]].clear()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", to)
    assert same(files.load(tmp_path / "b.safetensors")["state"][0]["slow_weights"], torch.full((70, 70), 0.3))
    for key in ("wrapper", 77):
        put(optimizer, "key", key)
    put(optimizer, "entry", "nested")
    optimizer.state[first(optimizer)]["nested"] = {"list": [torch.ones(2)]}
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.pt", to)
    state = files.load(tmp_path / "b.pt")["state"]
    assert same(state[77], {"ema": 0.5})
    assert same(state["wrapper"], {"scale": torch.ones(3)})
    assert same(state[0]["nested"], {"list": [torch.ones(2)]})
    with pytest.raises(CheckpointError, match=r"safetensors file cannot hold: write a \.pt file"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", to)
