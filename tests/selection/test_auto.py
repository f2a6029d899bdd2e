"""``variant="auto"`` from the first step on: what it decides, and what it spills when training grows."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.memory import gpu
from adamw_triton.state.buffers import StateBuffer
from tests.optimizer.problems import bits, parameters, set_grads, state_bits, train
from tests.selection.simulated import SimulatedGpu, install

KiB, MiB = 1 << 10, 1 << 20
SHAPES = ((256, 256),) * 16 + ((256,),) * 4
NUMEL = 16 * 65536
STATE_32, STATE_8 = 8 * NUMEL, NUMEL * 65 // 32
CPU = torch.device("cpu")


def optimizer_on(simulated: SimulatedGpu, **arguments: Any) -> AdamW:
    optimizer = AdamW(parameters(SHAPES), transfer="copy", **arguments)
    simulated.optimizer = optimizer
    return optimizer


def fill(total: int, state: int, *, training: int = 4 * MiB, activations: int = 2 * MiB) -> int:
    """Bytes of other processes that leave ``state`` bytes for state at the peak, slack apart."""
    return total - int(gpu.SLACK_SHARE * total) - training - activations - state


CHOICES = {
    "everything fits": (STATE_32 + 100 * KiB, "32bit"),
    "32 bits fit but for a little": (STATE_32 - 1, "8bit"),
    "8 bits fit": (STATE_8 + 100 * KiB, "8bit"),
    "8 bits fit but for a little": (STATE_8 - 1, "8bit, partly paged"),
    "a ring and no more": (3 * 64 * KiB, "8bit, partly paged"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_first_step_chooses_by_what_is_left_at_the_peak(
    choice: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room, expected = CHOICES[choice]
    simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, room))
    install(monkeypatch, simulated)
    caplog.set_level(logging.INFO, logger="adamw_triton")
    optimizer = optimizer_on(simulated)
    assert optimizer.plan is None
    for step in range(3):
        simulated.forward(2 * MiB)
        train(optimizer, 1, first=step)
        assert simulated.state <= room
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    assert optimizer.plan.chosen.name == expected
    assert optimizer.plan.limits[0].room == room
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("auto")]
    assert line == f"auto: {optimizer.plan.summary()}"


def test_who_prefers_exact_state_pages_before_it_goes_to_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefer, expected in (("speed", "8bit"), ("exact", "32bit, partly paged")):
        simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, STATE_8 + 100 * KiB))
        install(monkeypatch, simulated)
        optimizer = optimizer_on(simulated, prefer=prefer)
        simulated.forward(2 * MiB)
        train(optimizer, 1)
        assert optimizer.plan is not None
        assert (optimizer.plan.prefer, optimizer.plan.followed.name) == (prefer, expected)
        with pytest.raises(AttributeError, match="prefer is decided when an optimizer is made"):
            optimizer.prefer = "speed"


@pytest.mark.parametrize("room", [STATE_32 + MiB, STATE_8 + MiB, STATE_8 // 2])
def test_what_the_plan_says_is_what_is_taken(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, room))
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    simulated.forward(2 * MiB)
    train(optimizer, 1)
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    assert simulated.state == optimizer.plan.chosen.gpu_bytes
    on_host = sum(buffer.nbytes for buffer in optimizer._store.buffers if buffer.on_host)
    assert on_host == optimizer.plan.chosen.host_bytes


def test_the_bits_are_those_of_the_variant_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for room, variant in ((STATE_32 + MiB, "32bit"), (STATE_8 // 2, "8bit")):
        with monkeypatch.context() as patch:
            simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, room))
            install(patch, simulated)
            optimizer = optimizer_on(simulated)
            simulated.forward(2 * MiB)
            values = train(optimizer, 4)
        named = AdamW(parameters(SHAPES), variant=variant)
        assert bits(values) == bits(train(named, 4))
        assert state_bits(optimizer) == state_bits(named)


class Loop:
    """A user's training loop: it tries a step again after running out of memory, as often as it takes."""

    def __init__(self, simulated: SimulatedGpu, optimizer: AdamW) -> None:
        self.simulated, self.optimizer = simulated, optimizer
        self.failures: list[int] = []
        self.states: list[int] = []

    def run(self, steps: int, activations: Callable[[int], int]) -> None:
        for step in range(steps):
            for _ in range(20):
                try:
                    self.simulated.forward(activations(step))
                    break
                except torch.OutOfMemoryError:
                    self.failures.append(step)
            else:
                raise AssertionError(f"step {step} never fitted")
            train(self.optimizer, 1, first=step)
            self.states.append(self.simulated.state)
            assert (
                self.simulated.training + self.simulated.state + self.simulated.others <= self.simulated.total
            )


def grown(before: int, after: int) -> Callable[[int], int]:
    return lambda step: before if step < 50 else after


def test_what_takes_less_than_half_of_the_slack_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is loaded, a library's workspace: what the slack is there for. It once moved state, on
    the first GPU that was filled to the last byte."""
    total = 1000 * MiB
    simulated = SimulatedGpu(total, 4 * MiB)
    install(monkeypatch, simulated)
    loop = Loop(simulated, optimizer_on(simulated))
    slack = int(gpu.SLACK_SHARE * total)
    most = total - simulated.training - STATE_32 - MiB - slack
    loop.run(60, grown(most, most + MiB + slack // 3))
    assert loop.states[59] == loop.states[0] >= STATE_32
    loop.run(10, lambda step: most + 2 * slack // 3)
    assert loop.failures == []
    assert loop.states[-1] < STATE_32


def test_activations_that_double_into_the_slack_spill_before_anything_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The peak fits once more, but not beside the slack: state moves at the very step."""
    total = 100 * MiB
    simulated = SimulatedGpu(total, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    loop = Loop(simulated, optimizer)
    before = (total - simulated.training - STATE_32 - MiB) // 2
    loop.run(60, grown(before, 2 * before))
    assert loop.failures == []
    assert loop.states[49] == loop.states[0] > loop.states[50] == loop.states[59]
    assert simulated.peak <= total
    assert simulated.training + loop.states[50] + 2 * before + int(gpu.SLACK_SHARE * total) <= total
    assert [r.getMessage() for r in caplog.records if "moved" in r.getMessage()] == [
        "auto: training has come to need more memory (1.0 MiB): 1.5 MiB of state moved from cpu to the host, "
        "until there is room for it over 100 steps"
    ]
    named = AdamW(parameters(SHAPES), variant="32bit")
    train(named, 60, first=0)
    assert state_bits(optimizer) == state_bits(named)


def test_activations_that_double_beyond_the_limit_fail_once_and_then_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """State was in the way: the failure itself makes room, and the retry finds it."""
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    loop = Loop(simulated, optimizer)
    loop.run(60, grown(15 * MiB, 30 * MiB))
    assert loop.failures == [50]
    assert loop.states[49] > loop.states[50] == loop.states[59]
    assert simulated.peak <= simulated.total
    assert len([r for r in caplog.records if "an allocation failed" in r.getMessage()]) == 1
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    assert optimizer.plan.chosen.name == "32bit"  # as decided: only the place has changed
    named = AdamW(parameters(SHAPES), variant="32bit")
    train(named, 60, first=0)
    assert state_bits(optimizer) == state_bits(named)


def test_every_failure_makes_more_room_until_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    simulated.forward(MiB)
    train(optimizer, 1)
    states = [simulated.state]
    for _ in range(12):
        with pytest.raises(torch.OutOfMemoryError):
            simulated.forward(100 * MiB)
        states.append(simulated.state)
    assert states == sorted(states, reverse=True)
    assert states[-1] == 0
    simulated.forward(MiB)
    train(optimizer, 1, first=2)
    assert 0 < simulated.state <= 3 * 64 * KiB


def test_an_allocator_that_had_to_flush_its_cache_is_given_room(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    loop = Loop(simulated, optimizer)
    loop.run(3, lambda step: MiB)
    simulated.retries += 1
    loop.run(3, lambda step: MiB)
    assert loop.states[2] - loop.states[3] >= int(gpu.SLACK_SHARE * 40 * MiB) - 3 * 64 * KiB
    assert loop.states[3] == loop.states[5]


def test_running_out_of_memory_within_a_step_moves_state_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step nothing may move."""
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    loop = Loop(simulated, optimizer)
    loop.run(2, lambda step: MiB)
    before = simulated.state
    real = optimizer._store.prepare

    def failing(work: Any) -> None:
        simulated.tell(2 * MiB)
        assert simulated.state == before
        raise torch.OutOfMemoryError("no room for a copy")

    monkeypatch.setattr(optimizer._store, "prepare", failing)
    with pytest.raises(torch.OutOfMemoryError):
        train(optimizer, 1, first=3)
    monkeypatch.setattr(optimizer._store, "prepare", real)
    train(optimizer, 1, first=3)
    assert simulated.state <= before - 2 * MiB


def test_a_choice_that_runs_out_of_memory_is_followed_by_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fragmentation that no figure shows, say."""
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    real = StateBuffer._allocate

    def allocate(self: StateBuffer) -> dict[str, torch.Tensor]:
        if self.format.name == "32bit" and self.numel > 10_000 and not self.on_host:
            simulated.tell(self.nbytes)
            raise torch.OutOfMemoryError
        return real(self)

    monkeypatch.setattr(StateBuffer, "_allocate", allocate)
    simulated.forward(MiB)
    train(optimizer, 3)
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    assert optimizer.plan.chosen.name == "8bit"
    assert optimizer.plan.reason(optimizer.plan.candidates[0]) == "ran out of memory when it was allocated"
    named = AdamW(parameters(SHAPES), variant="8bit")
    train(named, 3)
    assert state_bits(optimizer) == state_bits(named)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("auto:")]
    assert said == ["auto: 32bit ran out of memory; 8bit is used"]


@pytest.mark.parametrize("loaded", [False, True])
def test_where_every_choice_runs_out_of_memory_the_first_one_stays(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step may find room again, and shall not be left with the last resort for ever."""
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer, named = optimizer_on(simulated), AdamW(parameters(SHAPES), variant="32bit")
    other = AdamW(parameters(SHAPES), variant="32bit", amsgrad=True)  # which wants memory of its own
    simulated.forward(MiB)
    train(other, 1)
    train(named, 2)
    train(optimizer, int(loaded))

    def allocate(self: StateBuffer) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError

    def use() -> None:
        if loaded:
            optimizer.load_state_dict(other.state_dict())
        else:
            train(optimizer, 1)

    with monkeypatch.context() as patch:
        patch.setattr(StateBuffer, "_allocate", allocate)
        with pytest.raises(torch.OutOfMemoryError):
            use()
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    assert optimizer.plan.chosen.name == "32bit"
    train(optimizer, 2 - loaded, first=1 + loaded)
    assert state_bits(optimizer) == state_bits(named)


def test_where_nothing_fits_the_last_resort_is_tried_and_said_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, 1000))
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    simulated.forward(2 * MiB)
    train(optimizer, 1)
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is None
    assert all(buffer.on_host for buffer in optimizer._store.buffers)
    assert simulated.state <= 3 * 64 * KiB
    assert "nothing fits: 32bit needs 8.0 MiB more GPU memory; 8bit needs 2.0" in caplog.text
    assert "Trying 8bit, partly paged" in caplog.text


def test_a_host_without_room_keeps_state_where_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated, host=100 * KiB)
    optimizer = optimizer_on(simulated)
    simulated.forward(MiB)
    train(optimizer, 1)
    before = simulated.state
    with pytest.raises(torch.OutOfMemoryError):
        simulated.forward(100 * MiB)
    assert simulated.state == before
    assert "state has to stay on cpu: paged optimizer state needs" in caplog.text
    train(optimizer, 1, first=2)


# What the user says


def test_a_budget_is_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedGpu(400 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated, memory_budget="1MiB")
    simulated.forward(MiB)
    train(optimizer, 2)
    assert optimizer.plan is not None
    assert optimizer.plan.limits[0].room == MiB
    assert simulated.state <= MiB


def test_a_groups_own_bits_and_amsgrad_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, 3 * MiB))
    install(monkeypatch, simulated)
    params = parameters(((256, 256),) * 4)
    groups = [
        {"params": params[:1], "state_bits": 32},
        {"params": params[1:2], "amsgrad": True},
        {"params": params[2:3], "state_bits": 8},
        {"params": params[3:]},
    ]
    optimizer = AdamW(groups, transfer="copy")
    simulated.optimizer = optimizer
    simulated.forward(2 * MiB)
    train(optimizer, 2)
    assert "exp_avg" in optimizer.state[params[0]]
    assert "max_exp_avg_sq" in optimizer.state[params[1]]
    assert "exp_avg_codes" in optimizer.state[params[2]]
    assert simulated.state == sum(c.gpu_bytes for c in [optimizer.plan.chosen] if c)  # type: ignore[union-attr]


# Checkpoints, copies


@pytest.mark.parametrize("source", ["32bit", "8bit", "paged_8bit"])
def test_a_checkpoint_that_is_loaded_first_is_no_reason_to_choose_otherwise(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are not part of what training needs, and wait until the first step places them."""
    saved = AdamW(parameters(SHAPES), variant=source)
    train(saved, 3)
    state_dict = copy.deepcopy(saved.state_dict())
    held = sum(t.nbytes for entry in state_dict["state"].values() for t in entry.values())
    simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, STATE_32 + 100 * KiB))
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    with torch.no_grad():
        for param, value in zip(
            optimizer.param_groups[0]["params"], saved.param_groups[0]["params"], strict=True
        ):
            param.copy_(value)
    optimizer.load_state_dict(state_dict)
    assert optimizer.plan is None
    simulated.peak = simulated.training + 2 * MiB + held  # forward and backward, beside what was loaded
    train(optimizer, 2, first=4)
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    assert optimizer.plan.chosen.name == "32bit"
    if source == "32bit":
        train(saved, 2, first=4)
        assert state_bits(optimizer) == state_bits(saved)
        assert bits(optimizer.param_groups[0]["params"]) == bits(saved.param_groups[0]["params"])


def test_loading_after_the_first_step_keeps_the_plan_and_what_was_spilled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    loop = Loop(simulated, optimizer)
    loop.run(2, lambda step: 15 * MiB)
    loop.run(2, lambda step: 30 * MiB)
    plan, held = optimizer.plan, simulated.state
    other = AdamW(parameters(SHAPES), variant="8bit")
    train(other, 3)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert optimizer.plan is plan
    loop.run(2, lambda step: 30 * MiB)
    assert simulated.state == held
    assert loop.failures == [0]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_keep_the_plan(way: Callable[[AdamW], AdamW], monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, STATE_8 // 2))
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    simulated.forward(2 * MiB)
    train(optimizer, 2)
    twin = way(optimizer)
    assert twin.plan == optimizer.plan
    simulated.optimizer = twin
    train(twin, 2, first=3)
    train(optimizer, 2, first=3)
    assert state_bits(twin) == state_bits(optimizer)
    assert simulated.state <= STATE_8 // 2


def test_nothing_keeps_a_dropped_optimizer_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    optimizer = optimizer_on(simulated)
    train(optimizer, 1)
    (listener,) = simulated.listeners
    simulated.optimizer = None
    del optimizer
    gc.collect()
    assert listener() is None


# The CPU, and GPUs that share its memory


def test_on_the_cpu_state_is_exact_where_the_host_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = AdamW(parameters(SHAPES))
    train(optimizer, 1)
    assert optimizer.plan is not None
    assert [optimizer.plan.reason(candidate) for candidate in optimizer.plan.candidates] == [
        "chosen: the first that fits",
        "fits too",
        *["gains nothing: that memory is the host's"] * 4,
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_a_host_with_little_room_gets_8_bits(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own, and where a GPU takes its memory from there: whatever it says is free."""
    simulated = SimulatedGpu(400 * MiB, 4 * MiB)
    simulated.shared = True
    install(monkeypatch, simulated, host=STATE_8 + MiB + (int(gpu.SLACK_SHARE * 400 * MiB) if shared else 0))
    if not shared:
        monkeypatch.setattr(gpu, "allocator_for", lambda device: None)
    optimizer = AdamW(parameters(SHAPES))
    simulated.forward(MiB)
    train(optimizer, 1)
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    assert optimizer.plan.chosen.name == "8bit"
    assert optimizer.plan.candidates[0].obstacle.startswith("needs ")
    assert optimizer.plan.candidates[0].obstacle.endswith("more host memory")


def test_parameters_are_counted_as_they_are_at_the_first_step() -> None:
    """Frozen ones have no state, those of a group that comes later have a place in time."""
    params = [Parameter(torch.ones(5000)), Parameter(torch.ones(70_000), requires_grad=False)]
    optimizer = AdamW(params)
    set_grads(params[:1], 1)
    optimizer.step()
    assert optimizer.plan is not None
    assert optimizer.plan.candidates[0].host_bytes == 8 * 5024
