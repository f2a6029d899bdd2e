"""``variant="auto"`` decides at the first step that is one: not before, whatever is called, and not later."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter

from adamw_triton import AdamW
from tests.optimizer.problems import bits, parameters, set_grads, state_bits, train
from tests.selection.simulated import SimulatedGpu, install
from tests.selection.test_auto import STATE_8, STATE_32, MiB, fill, optimizer_on

SHAPES = ((70, 70), (10,), (0,))


def zero_step(optimizer: AdamW) -> None:
    """As torch.distributed.checkpoint takes one."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], Tensor) else 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


def load(optimizer: AdamW) -> None:
    saved = AdamW(parameters(SHAPES), variant="32bit")
    train(saved, 2)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))


BEFORE: dict[str, Callable[[AdamW], Any]] = {
    "nothing": lambda optimizer: None,
    "load": load,
    "offload": lambda optimizer: optimizer.offload(),
    "reload": lambda optimizer: optimizer.reload(),
    "load, offload": lambda optimizer: (load(optimizer), optimizer.offload()),
    "load, reload": lambda optimizer: (load(optimizer), optimizer.reload()),
    "load, offload, reload": lambda optimizer: (load(optimizer), optimizer.offload(), optimizer.reload()),
    "a step without gradients": lambda optimizer: optimizer.step(),
    "a step of zeros": zero_step,
    "a step of zeros, offload": lambda optimizer: (zero_step(optimizer), optimizer.offload()),
    "a step of zeros, load": lambda optimizer: (zero_step(optimizer), load(optimizer)),
    "a state dict": lambda optimizer: optimizer.state_dict(),
    "another group": lambda optimizer: optimizer.add_param_group({"params": parameters(((5,),))}),
    "memory": lambda optimizer: optimizer.memory(),
}


@pytest.mark.parametrize("before", BEFORE)
def test_the_first_step_decides_whatever_was_called_before(before: str) -> None:
    """And it is the same step: what came before has counted nothing."""
    optimizer, named = (AdamW(parameters(SHAPES), variant=variant) for variant in ("auto", "32bit"))
    BEFORE[before](optimizer)
    assert optimizer.plan is None
    assert optimizer._store.buffers == []
    if before.startswith("load") or before.endswith(", load"):
        load(named)
    if "group" in before:
        BEFORE[before](named)
    train(optimizer, 1, first=3)
    assert optimizer.plan is not None
    train(named, 1, first=3)
    train(optimizer, 1, first=4)
    train(named, 1, first=4)
    assert state_bits(optimizer) == state_bits(named)
    for ours, theirs in zip(optimizer.param_groups, named.param_groups, strict=True):
        assert bits(ours["params"]) == bits(theirs["params"])


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(("zeros", "real"), [(1, 1), (2, 1), (4, 2), (1, 3), (0, 2)])
def test_one_step_of_zeros_before_there_is_state_is_uncounted_and_no_other(
    zeros: int, real: int, loaded: bool
) -> None:
    """With any variant; torch's counts that one too."""
    ours, named, torchs = (
        make(parameters(SHAPES)) for make in (AdamW, lambda p: AdamW(p, variant="32bit"), torch.optim.AdamW)
    )
    for optimizer in (ours, named):
        if loaded:
            load(optimizer)
    if loaded:
        torchs.load_state_dict(copy.deepcopy(named.state_dict()))
    for optimizer in (ours, named, torchs):
        for _ in range(zeros):
            zero_step(optimizer)  # type: ignore[arg-type]
        for seed in range(3, 3 + real):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()

    def counts(optimizer: torch.optim.Optimizer) -> set[float]:
        return {float(entry["step"]) for entry in optimizer.state.values()}

    begun = 2 * loaded
    uncounted = 1 if zeros and not loaded else 0
    assert counts(torchs) == {begun + zeros + real}
    assert counts(ours) == counts(named) == {begun + zeros + real - uncounted}
    assert state_bits(ours) == state_bits(named)


def test_a_rank_without_elements_takes_the_step_of_zeros_as_others_do() -> None:
    """A shard may have none; were it to decide then, others could only follow."""
    optimizer = AdamW(parameters(((0,), (0, 5))))
    zero_step(optimizer)
    assert optimizer.plan is None
    train(optimizer, 1)
    assert optimizer.plan is not None


def test_what_others_keep_in_state_makes_it_a_step() -> None:
    """No framework takes its step of zeros then."""
    optimizer = AdamW(parameters(SHAPES))
    optimizer.state["slow"] = {"steps": 3}  # type: ignore[index]
    zero_step(optimizer)
    assert optimizer.plan is not None
    assert {float(optimizer.state[p]["step"]) for p in optimizer.param_groups[0]["params"]} == {1}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_decide_for_themselves(way: Callable[[AdamW], AdamW]) -> None:
    optimizer = AdamW(parameters(SHAPES))
    zero_step(optimizer)
    twin = way(optimizer)
    assert twin.plan is None
    train(twin, 1)
    assert twin.plan is not None
    assert optimizer.plan is None


@pytest.mark.parametrize(
    ("lr", "grad", "decides"),
    [
        (0.0, 0.0, False),
        (0.0, -0.0, False),
        (torch.tensor(0.0), 0.0, False),
        (0.0, 1e-30, True),  # a warm-up that begins at zero
        (0.0, float("nan"), True),
        (1e-3, 0.0, True),
    ],
)
def test_only_zeros_of_both_kinds_are_no_first_step(lr: Any, grad: float, decides: bool) -> None:
    params = [Parameter(torch.ones(10)), Parameter(torch.ones(20, dtype=torch.bfloat16))]
    optimizer = AdamW(params, lr=1e-3)
    optimizer.param_groups[0]["lr"] = lr
    for param in params:
        param.grad = torch.zeros_like(param)
    params[1].grad[-1] = grad  # type: ignore[index]
    before = bits(params)
    optimizer.step()
    assert (optimizer.plan is not None) == decides
    assert decides or bits(params) == before
    assert all(float(entry["step"]) == decides for entry in optimizer.state.values())


def test_a_group_that_learns_makes_it_a_step() -> None:
    params = parameters(((10,), (20,)))
    optimizer = AdamW([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.plan is not None


def test_what_is_shown_has_the_keys_and_shapes_that_steps_make() -> None:
    """For parameters that are trained, and no others."""
    groups: list[dict[str, Any]] = [
        {"params": [Parameter(torch.ones(4, 5)), Parameter(torch.ones(3, 2).t())]},
        {"params": [Parameter(torch.ones(5000))], "state_bits": 8},
        {"params": [Parameter(torch.ones(7, dtype=torch.complex64))], "amsgrad": True},
        {"params": [Parameter(torch.ones(9), requires_grad=False)]},
    ]
    optimizer, stepped = AdamW(groups), AdamW(copy.deepcopy(groups))
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for param in trained:
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    params = [p for group in stepped.param_groups for p in group["params"] if p.requires_grad]
    set_grads(params, 1)
    stepped.step()

    def form(state: Any, keys: list[Parameter]) -> list[Any]:
        return [{name: (t.shape, t.dtype, t.stride()) for name, t in state[key].items()} for key in keys]

    assert form(optimizer.state, trained) == form(stepped.state, params)
    assert len(optimizer.state) == len(trained)
    assert not any(bool(t.any()) for entry in optimizer.state.values() for t in entry.values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("room", [STATE_32 + MiB, STATE_8 + MiB, STATE_8 // 2])
def test_distributed_checkpoints_resume_into_what_training_had(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their step of zeros comes before anything shows what activations take."""

    def begin() -> tuple[SimulatedGpu, nn.Module, AdamW]:
        simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, room))
        install(monkeypatch, simulated)
        model = nn.ParameterList(parameters(((256, 256),) * 16 + ((256,),) * 4))
        simulated.optimizer = AdamW(model.parameters(), transfer="copy")
        return simulated, model, simulated.optimizer

    simulated, model, optimizer = begin()
    simulated.forward(2 * MiB)
    train(optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    values = copy.deepcopy(model.state_dict())
    simulated, twin, resumed = begin()
    twin.load_state_dict(values)
    set_optimizer_state_dict(twin, resumed, saved)
    assert simulated.state == 0
    simulated.forward(2 * MiB)
    train(resumed, 2, first=3)
    train(optimizer, 2, first=3)
    assert resumed.plan is not None
    assert optimizer.plan is not None
    assert resumed.plan.chosen is not None
    assert optimizer.plan.chosen is not None
    assert resumed.plan.chosen.bits == optimizer.plan.chosen.bits
    assert state_bits(resumed) == state_bits(optimizer)


def test_offloading_before_the_decision_takes_what_was_loaded_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Codes are not decoded: the first step may choose 8 bits, and goes on exactly."""
    saved = AdamW(parameters(((256, 256),) * 16 + ((256,),) * 4), variant="8bit")
    train(saved, 2)
    simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, STATE_8 + MiB))
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    with torch.no_grad():
        for ours, theirs in zip(
            optimizer.param_groups[0]["params"], saved.param_groups[0]["params"], strict=True
        ):
            ours.copy_(theirs)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    optimizer.offload()
    simulated.peak = simulated.training + 2 * MiB
    train(optimizer, 1, first=3)
    train(saved, 1, first=3)
    assert state_bits(optimizer) == state_bits(saved)
