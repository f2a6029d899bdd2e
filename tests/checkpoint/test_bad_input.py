"""What cannot be loaded is refused with the parameter's name, and the optimizer is as it was, bit for bit."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamw_triton import AdamW
from tests.checkpoint.sources import SHAPES, trained
from tests.optimizer.problems import bits, parameters, state_bits, train

VARIANTS = ("32bit", "8bit", "paged_8bit")
SECOND = "parameter 'layer.1'"
StateDict = dict[str, Any]


def optimizer_with_state(variant: str) -> AdamW:
    named = [(f"layer.{index}", param) for index, param in enumerate(parameters(SHAPES))]
    optimizer = AdamW([{"params": named[:2]}, {"params": named[2:]}], lr=0.125, variant=variant)
    train(optimizer, 2)
    return optimizer


def snapshot(optimizer: AdamW) -> tuple[Any, ...]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    places = [[t.data_ptr() for t in entry.values()] for entry in optimizer.state.values()]
    return bits(params), state_bits(optimizer), options, places


def check_refused(optimizer: AdamW, state_dict: StateDict, message: str) -> None:
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer) == before
    twin = AdamW(
        [
            {**group, "params": [Parameter(p.detach().clone()) for p in group["params"]]}
            for group in optimizer.param_groups
        ],
        variant=optimizer.variant,
    )
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert bits(train(twin, 1, first=3)) == bits(train(optimizer, 1, first=3))


# --- Our own form, spoiled --------------------------------------------------------------------------------


def spoil(key: str, change: Callable[[Tensor], Any]) -> Callable[[StateDict], None]:
    def apply(state_dict: StateDict) -> None:
        state_dict["state"][1][key] = change(state_dict["state"][1][key])

    return apply


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def group(index: int, **changes: Any) -> Callable[[StateDict], None]:
    return lambda state_dict: state_dict["param_groups"][index].update(changes)


def without(index: int, key: str) -> Callable[[StateDict], None]:
    return lambda state_dict: state_dict["param_groups"][index].pop(key)


def drop_parameter(state_dict: StateDict) -> None:
    for key in ("params", "param_names"):
        state_dict["param_groups"][0][key] = state_dict["param_groups"][0][key][:1]
    del state_dict["state"][1]


def add_parameter(state_dict: StateDict) -> None:
    state_dict["param_groups"][1]["params"].append(9)
    state_dict["param_groups"][1]["param_names"].append("layer.9")


ANY: dict[str, tuple[Callable[[StateDict], Any], str]] = {
    "a missing parameter": (drop_parameter, r"doesn't match the size.*missing: layer\.1; unknown: none"),
    "an extra parameter": (add_parameter, r"doesn't match the size.*missing: none; unknown: layer\.9"),
    "parameters in another order": (
        group(1, param_names=["layer.3", "layer.2", "layer.4"]),
        r"parameter 'layer\.3' is number 2 .* where the optimizer has 'layer\.2'",
    ),
    "state of no parameter": (lambda s: s["state"].update({77: s["state"][0]}), r"entries for \[77\]"),
    "no groups": (lambda s: s.pop("param_groups"), "which has 'state' and 'param_groups': it has"),
    "a newer version": (lambda s: s.update(adamw_triton_version=2), "adamw_triton_version=2"),
    "no entry": (lambda s: s["state"].update({1: [1.0]}), f"state of {SECOND} is a list"),
    "entries renamed": (
        lambda s: s["state"][1].update(exp_avgs=s["state"][1].pop(min(s["state"][1]))),
        rf"state of {SECOND} has .*unknown: exp_avgs; missing: exp_avg",
    ),
    "entry None": (lambda s: s["state"].update({1: None}), f"state of {SECOND} is a NoneType"),
    "entry an empty list": (lambda s: s["state"].update({1: []}), f"state of {SECOND} is a list"),
    "two with one number": (
        lambda s: (s["state"].pop(0), s["param_groups"][0].update(params=[1, 1])),
        "'layer.1' and another have the same number, 1",
    ),
    "step a bool": (spoil("step", lambda _: True), f"state of {SECOND}: step is True"),
    "step a fraction": (spoil("step", lambda _: 2.5), f"state of {SECOND}: step is 2.5"),
    "step huge": (spoil("step", lambda _: 10**400), f"state of {SECOND}: step is 1000"),
    "step meta": (spoil("step", lambda t: t.to("meta")), f"state of {SECOND}: step is on the meta device"),
    "groups no dicts": (lambda s: s.update(param_groups=[1, 2]), r"param_groups\[0\] is a int, not a dict"),
    "params None": (group(1, params=None), r"param_groups\[1\]: params is a NoneType, not a list"),
    "params unhashable": (group(1, params=[[], 3, 4]), r"param_groups\[1\]: \[\] in params"),
    "names numbers": (group(1, param_names=[1, 2, 3]), r"param_groups\[1\]: 1 in param_names is no name"),
    "lr a bool": (group(1, lr=True), r"param_groups\[1\]: lr must be a number, got True"),
    "lr huge": (group(1, lr=10**400), r"param_groups\[1\]: lr must be a number, got 1000"),
    "betas None": (group(1, betas=None), r"param_groups\[1\]: betas must be two numbers, got None"),
    "amsgrad a text": (group(1, amsgrad="False"), r"param_groups\[1\]: amsgrad must be True or False"),
    "a missing key": (lambda s: s["state"][1].pop("step"), rf"state of {SECOND} has .*missing: step"),
    "step NaN": (spoil("step", lambda _: torch.tensor(math.nan)), f"state of {SECOND}: step is"),
    "step negative": (spoil("step", lambda _: -1), f"state of {SECOND}: step is -1"),
    "step a text": (spoil("step", lambda _: "two"), f"state of {SECOND}: step is 'two'"),
    "steps": (spoil("step", lambda _: torch.ones(2)), f"state of {SECOND}: step is"),
    "lr": (group(1, lr=-1.0), r"param_groups\[1\]: Invalid learning rate: -1.0"),
    "lr a text": (group(1, lr="high"), r"param_groups\[1\]"),
    "betas": (group(0, betas=(0.9, 1.0)), r"param_groups\[0\]: Invalid beta parameter at index 1"),
    "no betas": (without(1, "betas"), r"param_groups\[1\] is no AdamW's: it has no betas"),
}

OF_32BIT: dict[str, tuple[Callable[[StateDict], Any], str]] = {
    "shape": (
        spoil("exp_avg", lambda t: t[:-1].clone()),
        rf"state of {SECOND}: exp_avg has shape \(63, 128\), expected \(64, 128\)",
    ),
    "transposed": (spoil("exp_avg_sq", lambda t: t.T), rf"{SECOND}: exp_avg_sq has shape \(128, 64\)"),
    "dtype": (spoil("exp_avg", lambda t: t.int()), rf"{SECOND}: exp_avg has dtype torch\.int32"),
    "no tensor": (spoil("exp_avg", lambda t: t.tolist()), rf"{SECOND}: exp_avg is a list, not a tensor"),
    "meta": (spoil("exp_avg", lambda t: t.to("meta")), f"{SECOND}: exp_avg is on the meta device"),
    "sparse": (spoil("exp_avg", lambda t: t.to_sparse()), rf"{SECOND}: exp_avg has layout torch\.sparse_coo"),
    "sparse rows": (spoil("exp_avg", lambda t: t.to_sparse_csr()), f"{SECOND}: exp_avg has layout"),
    "nested": (
        spoil("exp_avg", lambda t: torch.nested.nested_tensor([t])),
        f"{SECOND}: exp_avg has layout nested",
    ),
    "a subclass": (spoil("exp_avg", lambda t: TwoTensor(t, t)), f"{SECOND}: exp_avg is a TwoTensor"),
    "a fake": (spoil("exp_avg", lambda t: FakeTensorMode().from_tensor(t)), f"{SECOND}: exp_avg is a Fake"),
    "NaN": (spoil("exp_avg", with_first(math.nan)), f"{SECOND}: exp_avg has values that are NaN"),
    "infinite": (spoil("exp_avg_sq", with_first(math.inf)), f"{SECOND}: exp_avg_sq has values that are NaN"),
    "negative v": (spoil("exp_avg_sq", with_first(-1e-30)), f"{SECOND}: exp_avg_sq has values.* or negative"),
    "too large for fp32": (
        spoil("exp_avg_sq", lambda t: with_first(1e300)(t.double())),
        f"{SECOND}: exp_avg_sq has values",
    ),
    "m of no AdamW": (spoil("exp_avg", with_first(-1e30)), f"{SECOND}: exp_avg has values"),
}

OF_8BIT: dict[str, tuple[Callable[[StateDict], Any], str]] = {
    "shape": (
        spoil("exp_avg_codes", lambda t: t[:-1].clone()),
        rf"state of {SECOND}: exp_avg_codes has shape \(63, 128\), expected \(64, 128\)",
    ),
    "cast codes": (
        spoil("exp_avg_codes", lambda t: t.float()),
        rf"{SECOND}: exp_avg_codes has dtype torch\.float32, expected torch\.int8",
    ),
    "unsigned codes": (spoil("exp_avg_codes", lambda t: t.view(torch.uint8)), "expected torch.int8"),
    "code out of range": (spoil("exp_avg_codes", with_first(-128)), f"{SECOND}: exp_avg_codes .*below -127"),
    "memory order": (
        spoil("exp_avg_codes", lambda t: t.T.contiguous().T),
        f"state of {SECOND}: its codes lie in different memory orders",
    ),
    "NaN scale of m": (spoil("exp_avg_scales", with_first(math.nan)), f"{SECOND}: exp_avg_scales has.*NaN"),
    "NaN scale of v": (spoil("exp_avg_sq_scales", with_first(math.nan)), f"{SECOND}: exp_avg_sq_scales"),
    "infinite scale": (spoil("exp_avg_sq_scales", with_first(math.inf)), f"{SECOND}: exp_avg_sq_scales"),
    "negative scale": (spoil("exp_avg_sq_scales", with_first(-1.0)), f"{SECOND}: exp_avg_sq_scales"),
    "scales lost": (spoil("exp_avg_scales", lambda t: t[:-1].clone()), f"{SECOND}: scales of different"),
    "scales cast": (spoil("exp_avg_scales", lambda t: t.half()), f"{SECOND}: exp_avg_scales has dtype"),
    "scale whose v is infinite": (
        spoil("exp_avg_sq_scales", with_first(1e30)),
        f"{SECOND}: exp_avg_sq_scales",
    ),
    "scale whose v is nothing": (
        spoil("exp_avg_sq_scales", with_first(1e-25)),
        f"{SECOND}: exp_avg_sq_scales has scales below 1.08e-19, too small to decode",
    ),
    "scale of no AdamW's m": (
        spoil("exp_avg_scales", lambda t: with_first(1e30)(t).fill_(1e30)),
        f"{SECOND}: exp_avg_scales times exp_avg_sq_scales make of exp_avg_codes values up to",
    ),
    "codes meta": (spoil("exp_avg_codes", lambda t: t.to("meta")), f"{SECOND}: exp_avg_codes is on the meta"),
    "amsgrad": (group(0, amsgrad=True), r"param_groups\[0\]: amsgrad=True needs 32-bit state"),
}

CASES = [
    pytest.param(variant, *case, id=f"{variant}-{name}")
    for variant in VARIANTS
    for name, case in {**ANY, **(OF_32BIT if variant == "32bit" else OF_8BIT)}.items()
]


@pytest.mark.parametrize(("variant", "spoiling", "message"), CASES)
def test_a_spoiled_state_dict(variant: str, spoiling: Callable[[StateDict], Any], message: str) -> None:
    optimizer = optimizer_with_state(variant)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for entry in state_dict["state"].values():
        entry["step"] = torch.tensor(77.0)
        for key, value in entry.items():
            if key != "step":
                value.fill_(1)  # whatever of it arrives shows
    state_dict["param_groups"][0]["eps"] = 0.5
    spoiling(state_dict)
    check_refused(optimizer, state_dict, message)


# --- Other optimizers -------------------------------------------------------------------------------------


def other(make: Callable[[list[Parameter]], torch.optim.Optimizer], steps: int = 1) -> StateDict:
    params = parameters(SHAPES)
    optimizer = make(params)
    train(optimizer, steps)
    state_dict: StateDict = optimizer.state_dict()
    return state_dict


def as_adamws(state_dict: StateDict) -> StateDict:
    """With the options of an AdamW: the state itself has to give it away."""
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    groups = [{**options, "params": group["params"]} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def bnb_lion(params: list[Parameter], bits_: int) -> torch.optim.Optimizer:
    optim = pytest.importorskip("bitsandbytes.optim")
    optimizer: torch.optim.Optimizer = getattr(optim, f"Lion{bits_}bit")(params)
    return optimizer


OTHERS: dict[str, tuple[Callable[[list[Parameter]], torch.optim.Optimizer], str]] = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "momentum_buffer.*SGD's"),
    "RMSprop": (torch.optim.RMSprop, "square_avg.*RMSprop's"),
    "Adagrad": (torch.optim.Adagrad, "sum.*Adagrad's"),
    "Adamax": (torch.optim.Adamax, "exp_inf.*Adamax's"),
    "NAdam": (torch.optim.NAdam, "mu_product.*NAdam's"),
    "Rprop": (torch.optim.Rprop, "unknown: prev, step_size"),
    "bitsandbytes Lion 32-bit": (lambda p: bnb_lion(p, 32), "state1.*one moment: Lion"),
    "bitsandbytes Lion 8-bit": (lambda p: bnb_lion(p, 8), "absmax1.*one moment: Lion"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_optimizer(name: str) -> None:
    make, message = OTHERS[name]
    params = parameters(SHAPES)
    optimizer = AdamW(params, variant="8bit")
    train(optimizer, 2)
    check_refused(
        optimizer, as_adamws(other(make)), f"state of parameter 0 of group 0 has entries.*{message}"
    )


def test_state_of_lion() -> None:
    optimizer = AdamW(parameters(SHAPES))
    train(optimizer, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for entry in state_dict["state"].values():
        del entry["exp_avg_sq"], entry["step"]
    check_refused(optimizer, state_dict, r"parameter 0 of group 0 has entries \['exp_avg'\]: .*Lion's")


def test_groups_of_another_optimizer_without_state() -> None:
    """Before its first step it has nothing else to be known by."""
    optimizer = AdamW(parameters(SHAPES))
    train(optimizer, 2)
    sgd = torch.optim.SGD(parameters(SHAPES), 0.1)
    check_refused(
        optimizer, sgd.state_dict(), r"param_groups\[0\] is no AdamW's: it has no betas, eps, only lr"
    )


# --- Other AdamWs, spoiled --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("absmax1", with_first(math.nan), "absmax1 has scales that are NaN"),
        ("absmax2", lambda t: t[:-1].clone(), "scales of different or wrong shapes: absmax1"),
        ("qmap2", lambda t: t[:16].clone(), r"qmap2 has shape \(16,\), expected \(256,\)"),
        (
            "qmap1",
            lambda t: with_first(math.nan)(t.clone()),
            "qmap1 is a code table with values that are NaN",
        ),
        ("state1", lambda t: t.float(), r"state1 has dtype torch\.float32, expected torch\.uint8"),
        ("state2", lambda t: t.view(-1), r"state2 has shape \(8192,\), expected \(64, 128\)"),
    ],
)
def test_spoiled_state_of_bitsandbytes(key: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    state_dict = copy.deepcopy(trained("bitsandbytes 8-bit", steps=1)[1].state_dict())
    state = state_dict["state"][1]["__bnb_optimizer_quant_state__"]
    state[key] = change(state[key])
    optimizer = AdamW(parameters(SHAPES), variant="8bit")
    train(optimizer, 2)
    check_refused(optimizer, state_dict, f"state of parameter 1 of group 0: {message}")


def test_wrong_block_sizes_of_bitsandbytes() -> None:
    state_dict = copy.deepcopy(trained("bitsandbytes 8-bit", steps=1)[1].state_dict())
    state = state_dict["state"][1]["__bnb_optimizer_quant_state__"]
    for key in ("absmax1", "absmax2"):
        state[key] = state[key][:7].clone()
    optimizer = AdamW(parameters(SHAPES))
    message = r"parameter 1 of group 0: 7 scales for 8192 elements fit no block size of \(256, 2048\)"
    check_refused_without_state(optimizer, state_dict, message)


def test_spoiled_state_of_torchao() -> None:
    state_dict = trained("torchao 8-bit", steps=1)[1].state_dict()
    state_dict["state"][1]["exp_avg_sq"].scale[0] = math.nan
    optimizer = AdamW(parameters(SHAPES))
    check_refused_without_state(
        optimizer, state_dict, r"parameter 1 of group 0: exp_avg_sq\.scale has scales"
    )


def check_refused_without_state(optimizer: AdamW, state_dict: StateDict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert not optimizer.state
    fresh = AdamW(parameters(SHAPES))
    assert bits(train(optimizer, 2)) == bits(train(fresh, 2))


# --- Memory runs out --------------------------------------------------------------------------------------


def test_too_little_host_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_with_state("paged_8bit")
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["state_bits"] = 32  # which needs new buffers
    before = snapshot(optimizer)

    def refuse(nbytes: int, what: str) -> None:
        raise MemoryError(f"{nbytes} for {what}")

    with monkeypatch.context() as patch:
        patch.setattr("adamw_triton.places.placing.require_host", refuse)
        with pytest.raises(MemoryError, match="paged optimizer state"):
            optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer) == before
    train(optimizer, 1, first=3)


FEW = ((70, 70), (64, 128), (3,))


@pytest.mark.slow
@pytest.mark.parametrize("variants", [("32bit", "8bit"), ("8bit", "32bit"), ("8bit", "8bit")], ids=str)
@pytest.mark.parametrize("had_state", [True, False])
def test_memory_that_runs_out_halfway(
    had_state: bool, variants: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each operation that takes memory in turn: nothing has happened, and the next load goes well."""
    source = AdamW(parameters(FEW, torch.float16), variant=variants[0], block_size=256)
    train(source, 3)
    state_dict = copy.deepcopy(source.state_dict())
    for entry in state_dict["state"].values():
        for key in set(entry) & {"exp_avg", "exp_avg_sq"}:
            entry[key] = entry[key].half()
    for fails in itertools.count():
        optimizer = AdamW(parameters(FEW), variant=variants[1])
        if had_state:
            train(optimizer, 1)
        before = snapshot(optimizer)
        try:
            with Failing(fails):
                optimizer.load_state_dict(state_dict)
            break
        except torch.OutOfMemoryError:
            assert snapshot(optimizer) == before
        if fails % 16 == 0:
            fresh = AdamW(parameters(FEW), variant=variants[1])
            train(fresh, int(had_state))
            assert bits(train(optimizer, 1, first=2)) == bits(train(fresh, 1, first=2))
    assert fails > 3
    optimizer.step()


class Failing(TorchDispatchMode):
    """Lets so many operations take memory, and the next one not."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self._left = left

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and not t.is_meta and t.numel() > 8]
        if any(t.untyped_storage().data_ptr() not in given for t in made):
            self._left -= 1
            if self._left < 0:
                raise torch.OutOfMemoryError("not enough")
        return result


# --- A state_dict of views of the very state that is loaded -----------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_ones_own_state_changes_nothing(variant: str) -> None:
    optimizer = optimizer_with_state(variant)
    before = snapshot(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_takes_no_second_set_of_buffers(variant: str) -> None:
    optimizer = optimizer_with_state(variant)
    before = snapshot(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    train(optimizer, 2, first=3)
    optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer)[1:] == before[1:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ones_own_state_with_two_parameters_exchanged(variant: str) -> None:
    optimizer = AdamW(parameters([(64, 80), (64, 80), (7,), (7,)]), variant=variant)
    train(optimizer, 3)
    before = state_bits(optimizer)
    state_dict = optimizer.state_dict()
    state_dict["state"] = {i: state_dict["state"][i ^ 1] for i in range(4)}
    optimizer.load_state_dict(state_dict)
    assert state_bits(optimizer) == [before[i ^ 1] for i in range(4)]
