"""Whatever is done with an optimizer, in any order: beside torch's AdamW in float64 (``differential``).

2,000 operations in each run of the tests; ``ADAMW_TRITON_OPERATIONS=30000`` takes more of them. A failure
names its seed and its operations: ``replay(seed, variant, count)`` does them again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch

from adamw_triton import AdamW
from adamw_triton.state import placement
from tests.optimizer.differential import VARIANTS, Pair, copier, through_a_file

OPERATIONS = int(os.environ.get("ADAMW_TRITON_OPERATIONS", "2000"))
IN_A_RUN = 50
INFERENCE = 0.5
IN_TRITON = 5
"""Runs that are also taken through the interpreted kernels."""
RUNS = [(seed, VARIANTS[seed % len(VARIANTS)]) for seed in range(OPERATIONS // IN_A_RUN)]


def step(pair: Pair) -> None:
    give_gradients(pair)
    pair.step(pair.random.choice((None, None, None, 1024.0)))


def give_gradients(pair: Pair) -> None:
    """To most of the parameters that the optimizers have."""
    present = {id(param) for group in pair.ours.param_groups for param in group["params"]}
    for param in pair.params:
        there = id(param) in present and param.requires_grad and pair.random.random() < 0.8
        scale = 10 ** pair.random.uniform(-3, 1)
        param.grad = pair.noise(param.shape, param.dtype, scale) if there else None


def found_inf(pair: Pair) -> None:
    give_gradients(pair)
    before = [param.detach().clone() for param in pair.params]
    pair.ours.grad_scale, pair.ours.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    pair.ours.step()
    del pair.ours.grad_scale, pair.ours.found_inf
    assert all(map(torch.equal, pair.params, before))
    pair.check_unchanged()


def set_hyperparameters(pair: Pair) -> None:
    numbers = {
        "lr": 10 ** pair.random.uniform(-5, -1),
        "betas": pair.random.choice(((0.9, 0.999), (0.8, 0.95), (0.0, 0.99), (0.95, 0.9))),
        "eps": pair.random.choice((1e-8, 1e-6)),
        "weight_decay": pair.random.choice((0.0, 0.01, 1.0)),
        "maximize": pair.random.random() < 0.2,
    }
    if pair.random.random() < 0.2:
        numbers["lr"] = torch.tensor(numbers["lr"])
    group = pair.random.randrange(len(pair.ours.param_groups))
    for optimizer, _ in pair.both:
        optimizer.param_groups[group].update(copy.deepcopy(numbers))


def freeze_or_thaw(pair: Pair) -> None:
    param = pair.random.choice(pair.params)
    param.requires_grad_(not param.requires_grad)
    pair.check_unchanged()


def move(pair: Pair) -> None:
    """A parameter to some place of some group."""
    group, position = pair.random.choice(pair.places())
    target = pair.random.randrange(len(pair.ours.param_groups))
    at = pair.random.random()
    for optimizer, _ in pair.both:
        param = optimizer.param_groups[group]["params"].pop(position)
        members = optimizer.param_groups[target]["params"]
        members.insert(int(at * (len(members) + 1)), param)
    pair.check_unchanged()


def reorder_groups(pair: Pair) -> None:
    order = list(range(len(pair.ours.param_groups)))
    pair.random.shuffle(order)
    for optimizer, _ in pair.both:
        optimizer.param_groups[:] = [optimizer.param_groups[g] for g in order]
    pair.check_unchanged()


def replace_group(pair: Pair) -> None:
    """By a dict of the same."""
    for optimizer, _ in pair.both:
        optimizer.param_groups[0] = dict(
            optimizer.param_groups[0], params=list(optimizer.param_groups[0]["params"])
        )
    pair.check_unchanged()


def delete(pair: Pair) -> None:
    """A parameter out of its group, and its state with it."""
    if len(pair.places()) < 3:
        return
    group, position = pair.random.choice(pair.places())
    gone = pair.number(pair.ours.param_groups[group]["params"][position])
    for optimizer, _ in pair.both:
        optimizer.state.pop(optimizer.param_groups[group]["params"].pop(position), None)
    pair.check_unchanged(but=lambda number: number == gone)


def add(pair: Pair) -> None:
    """A new parameter, or one that had been deleted."""
    present = {pair.number(pair.ours.param_groups[g]["params"][i]) for g, i in pair.places()}
    absent = sorted(set(range(len(pair.params))) - present)
    number = pair.random.choice(absent) if absent and pair.random.random() < 0.5 else pair.new()
    how = pair.random.choice(("append", "group"))
    for optimizer, own in pair.both:
        if how == "append":
            optimizer.param_groups[-1]["params"].append(own[number])
        else:
            optimizer.add_param_group({"params": [own[number]], "lr": 1e-2})
    pair.check_unchanged()


def forget(pair: Pair) -> None:
    """The state of a parameter."""
    if not pair.known:
        return
    number = pair.random.choice(sorted(pair.known))
    del pair.ours.state[pair.params[number]]
    pair.check_unchanged(but=lambda other: other == number)
    assert number not in pair.known


def look(pair: Pair) -> None:
    """At the state of every parameter, which makes empty entries."""
    for group, position in pair.places():
        param = pair.ours.param_groups[group]["params"][position]
        entry = pair.ours.state[param]
        assert len(entry) == 0 or "step" in entry
    pair.check_unchanged()


def save_and_load(pair: Pair) -> None:
    """Into other optimizers of the same variant."""
    ours, theirs = pair.fresh()
    ours.load_state_dict(through_a_file(pair.ours.state_dict(), weights_only=True))
    theirs.load_state_dict(copy.deepcopy(pair.theirs.state_dict()))
    pair.take(ours, theirs)
    pair.check_unchanged()


def load_in_place(pair: Pair) -> None:
    form = pair.random.choice(("native", "portable"))
    if form == "portable" and any("exp_avg_codes" in entry for entry in pair.ours.state.values()):
        return  # is encoded anew
    pair.ours.load_state_dict(copy.deepcopy(pair.ours.state_dict(state_format=form)))
    pair.check_unchanged()


def change_variant(pair: Pair) -> None:
    """By a load: state is converted."""
    pair.variant = pair.random.choice(VARIANTS)
    ours, theirs = pair.fresh()
    ours.load_state_dict(through_a_file(pair.ours.state_dict(), weights_only=True))
    theirs.load_state_dict(copy.deepcopy(pair.theirs.state_dict()))
    before = pair.known
    pair.take(ours, theirs)
    accept_conversion(pair, before)


def load_from_torch(pair: Pair) -> None:
    """What torch's AdamW in float32 would have saved."""
    state = pair.theirs.state_dict()
    flat = [param for group in pair.ours.param_groups for param in group["params"]]
    numbers = {key: pair.number(param) for key, param in enumerate(flat)}
    state["state"] = {
        key: {
            name: value.float() if name == "step" or not value.is_complex() else value.to(torch.complex64)
            for name, value in pair.known[number].items()
        }
        for key, number in numbers.items()
        if number in pair.known
    }
    before = pair.known
    pair.ours.load_state_dict(copy.deepcopy(state))
    for group, theirs in zip(pair.ours.param_groups, pair.theirs.param_groups, strict=True):
        assert group["lr"] == theirs["lr"]
    accept_conversion(pair, before)


def accept_conversion(pair: Pair, before: dict[int, dict[str, torch.Tensor]]) -> None:
    """The moments are what they were, to the limits of the formats."""
    pair.known = pair.moments()
    assert set(pair.known) == set(before)
    for number, now in pair.known.items():
        assert torch.equal(now["step"], before[number]["step"])
        coded = pair.ours.state[pair.params[number]].get("exp_avg_codes")
        if coded is None:
            for name in set(now) & set(before[number]):
                assert torch.equal(now[name], before[number][name]), (number, name)
        else:
            sides = ({k: _parts(v) for k, v in side.items()} for side in (now, before[number]))
            pair.judge_codes(*sides, coded, 0.0, f"of {number}, converted")


def _parts(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def copied(pair: Pair) -> None:
    pair.copied(copier(pair.random.choice(("deepcopy", "pickle"))))
    pair.check_unchanged()


def offload(pair: Pair) -> None:
    with torch.inference_mode(pair.random.random() < INFERENCE):
        pair.ours.offload()
    pair.check_unchanged()


def reload(pair: Pair) -> None:
    with torch.inference_mode(pair.random.random() < INFERENCE):
        pair.ours.reload()
    pair.check_unchanged()


def hand_over(pair: Pair) -> None:
    """State tensors are replaced by copies, as Lightning does when it moves them."""
    if not pair.known:
        return
    entry = pair.ours.state[pair.params[pair.random.choice(sorted(pair.known))]]
    for name in list(entry):
        if torch.is_tensor(entry[name]):
            entry[name] = entry[name].clone()
    pair.check_unchanged()


def relay(pair: Pair) -> None:
    """Another memory order."""
    param = pair.random.choice(pair.params)
    order = list(range(param.dim()))
    pair.random.shuffle(order)
    back = sorted(range(param.dim()), key=order.__getitem__)
    param.grad = None
    param.data = param.data.permute(order).contiguous().permute(back)
    pair.check_unchanged()


def retype(pair: Pair) -> None:
    """Another dtype of the same parameter."""
    param = pair.random.choice(pair.params)
    if not param.is_complex():
        param.grad = None
        param.data = param.data.to(pair.random.choice((torch.float32, torch.bfloat16)))
    pair.check_unchanged()


def wrap(pair: Pair) -> None:
    """Somebody keeps tensors beside ours, in an entry and beside the entries."""
    pair.ours.state["wrapper"] = {"count": torch.tensor(3)}
    if pair.known:
        pair.ours.state[pair.params[min(pair.known)]]["slow_weights"] = torch.ones(3)
    pair.check_unchanged()
    assert int(pair.ours.state["wrapper"]["count"]) == 3


def unwrap(pair: Pair) -> None:
    pair.ours.state.pop("wrapper", None)
    for entry in pair.ours.state.values():
        entry.pop("slow_weights", None)
    pair.check_unchanged()


def refused_step(pair: Pair) -> None:
    """A parameter that cannot be stepped keeps all from being stepped."""
    group, position = pair.random.choice(pair.places())
    param = pair.ours.param_groups[group]["params"][position]
    if param.is_complex():
        return
    give_gradients(pair)
    data, trained = param.data, param.requires_grad
    param.grad = None
    if pair.random.random() < 0.5:
        param.data = data.double()
        param.grad = torch.ones_like(param)
    else:
        param.grad = torch.zeros_like(param).to_sparse() if param.dim() else None
        if param.grad is None:
            return
    before = [other.detach().clone() for other in pair.params]
    with pytest.raises((TypeError, RuntimeError)):
        pair.ours.step()
    assert all(map(torch.equal, pair.params, before))
    param.grad = None
    param.data = data
    param.requires_grad_(trained)
    pair.check_unchanged()


def refused_load(pair: Pair) -> None:
    damaged = copy.deepcopy(pair.ours.state_dict())
    how = pair.random.choice(("group", "shape", "meta", "entry", "nan"))
    entries = [
        e
        for e in damaged["state"].values()
        if isinstance(e, dict) and "exp_avg" in e and e["exp_avg"].numel()
    ]
    if how == "group" or not entries:
        damaged["param_groups"][0]["lr"] = -1.0
    elif how == "entry":
        damaged["state"][next(key for key, e in damaged["state"].items() if e is entries[0])] = [1]
    elif how == "shape":
        entries[0]["exp_avg"] = torch.zeros(11, 3)
    elif how == "meta":
        entries[0]["exp_avg_sq"] = entries[0]["exp_avg_sq"].to("meta")
    else:
        entries[0]["exp_avg"].reshape(-1)[0] = float("nan")
        entries[0]["exp_avg"] = torch.full_like(entries[0]["exp_avg"], float("nan"))
    with pytest.raises(ValueError, match=r"param|state"):
        pair.ours.load_state_dict(damaged)
    pair.check_unchanged()


WEIGHTS: dict[Callable[[Pair], None], int] = {
    step: 14,
    found_inf: 1,
    set_hyperparameters: 3,
    freeze_or_thaw: 2,
    move: 3,
    reorder_groups: 1,
    replace_group: 1,
    delete: 1,
    add: 1,
    forget: 1,
    look: 1,
    save_and_load: 2,
    load_in_place: 1,
    change_variant: 2,
    load_from_torch: 1,
    copied: 1,
    offload: 1,
    reload: 1,
    hand_over: 1,
    relay: 2,
    retype: 1,
    wrap: 1,
    unwrap: 1,
    refused_step: 1,
    refused_load: 1,
}


def replay(seed: int, variant: str, count: int = IN_A_RUN) -> Pair:
    """The first ``count`` operations of a seed."""
    pair = Pair(seed, variant)
    for _ in range(count):
        (operation,) = pair.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
        pair.log.append(operation.__name__)
        try:
            operation(pair)
        except BaseException:
            print(f"seed {seed}, {variant}: {' '.join(pair.log)}")
            raise
    return pair


@pytest.mark.parametrize(("seed", "variant"), RUNS)
def test_any_order_of_operations(
    seed: int, variant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton" and seed >= IN_TRITON:
        pytest.skip("the interpreter takes ten times as long")
    monkeypatch.setattr(placement, "PAGE_BYTES", 8 << 10)  # several pages a parameter
    replay(seed, variant)


@pytest.mark.parametrize("fault", ["exp_avg", "weight", "step"])
def test_a_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of these tests is one."""
    right = AdamW.step

    def wrong(self: AdamW, closure: None = None) -> None:
        right(self, closure)
        for param in self.param_groups[0]["params"]:
            if param.grad is not None and param.numel():
                faulty = param.data if fault == "weight" else self.state[param][fault]
                faulty.mul_(2.0 if fault == "step" else 1.01)

    monkeypatch.setattr(AdamW, "step", wrong)
    with pytest.raises(AssertionError, match="off by" if fault != "step" else ""):
        replay(0, "32bit")
