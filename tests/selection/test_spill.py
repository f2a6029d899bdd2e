"""A spill takes no GPU memory and touches nothing that stays; and what was spilled comes back when there has
long been room for it."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import random
import threading

import pytest
import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.places.placing import Wanted
from adamw_triton.places.store import Store
from adamw_triton.selection import watch
from adamw_triton.state import buffers, placement
from adamw_triton.state.buffers import State
from adamw_triton.state.formats import format_for
from adamw_triton.state.placement import Policy
from adamw_triton_kernels import fusion
from tests.optimizer.problems import parameters, set_grads, state_bits, train
from tests.selection.simulated import SimulatedGpu, install
from tests.selection.test_auto import CPU, SHAPES, KiB, Loop, MiB, fill, optimizer_on

SEEDS = int(os.environ.get("ADAMW_TRITON_SPILLS", "60"))
GRAIN = 1 << 18


@pytest.fixture(autouse=True)
def never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take longer than all steps here."""
    monkeypatch.setattr(fusion, "PATIENCE", 1 << 60)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each allocation of resident state."""
    monkeypatch.setattr(placement, "PAGE_BYTES", 64 << 10)
    found: list[int] = []
    real = buffers.StateBuffer._allocate

    def allocate(self: buffers.StateBuffer) -> dict[str, torch.Tensor]:
        if not self.on_host:
            found.append(self.nbytes)
        return real(self)

    monkeypatch.setattr(buffers.StateBuffer, "_allocate", allocate)
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_spill_takes_no_memory_and_leaves_alone_what_stays(seed: int, taken: list[int]) -> None:
    choose = random.Random(seed)
    sizes = [choose.choice((4000, 20_000, 300_000)) for _ in range(choose.randint(3, 40))]
    params = [Parameter(torch.zeros(choose.randint(1, size))) for size in sizes]
    bits = choose.choice((8, 32))
    state: State = {}
    store = Store(Policy(False, grain=GRAIN), "copy")
    wanted = [Wanted(param, "p", format_for(param.numel(), bits)) for param in params]
    store.reserve(wanted, state)
    store.attach([store.slots[id(param)] for param in params], state)
    expected = []
    for param in params:
        for name, tensor in state[param].items():
            if name != "step":
                tensor.fill_(choose.randint(1, 100))
        expected.append({name: tensor.clone() for name, tensor in state[param].items()})
    away = 0
    for _ in range(8):
        before, where = store.on_gpu(CPU), {buffer: buffer.arrays for buffer in store._resident(CPU)}
        taken.clear()
        asked = choose.randint(1, max(2, before // 2))
        if choose.random() < 0.3:
            returned = store.unspill(CPU, choose.randint(1, 2 * GRAIN + (1 << 19)), wanted, state)
            away -= returned
            assert store.on_gpu(CPU) - before == returned == sum(taken)
        else:
            freed = store.spill(CPU, asked, wanted, state)
            away += freed
            assert before - store.on_gpu(CPU) == freed
            assert taken == []
            assert freed >= min(asked, before)
            assert all(buffer.arrays is where[buffer] for buffer in store._resident(CPU))
        assert store.on_gpu(CPU) + away == sum(buffer.nbytes for buffer in store.buffers)
        assert store.intact(state)
        for param, entry in zip(params, expected, strict=True):
            assert all(torch.equal(state[param][name], tensor) for name, tensor in entry.items())
    # Whatever is asked for later goes where there is room, and nothing else moves.
    taken.clear()
    where = {buffer: buffer.arrays for buffer in store.buffers}
    later = Wanted(Parameter(torch.zeros(50_000)), "later", wanted[0].format)
    store.reserve([*wanted, later], state)
    assert all(buffer.arrays is arrays for buffer, arrays in where.items())
    made = store.slots[id(later.param)].buffer
    assert made.paged or sum(taken) == made.nbytes


def loop_on(monkeypatch: pytest.MonkeyPatch, quiet: int = 3) -> Loop:
    monkeypatch.setattr(watch, "QUIET", quiet)
    simulated = SimulatedGpu(40 * MiB, 4 * MiB)
    install(monkeypatch, simulated)
    return Loop(simulated, optimizer_on(simulated))


@pytest.mark.slow
def test_one_failure_of_anybody_does_not_spill_for_good(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="adamw_triton")
    loop = loop_on(monkeypatch)
    loop.run(2, lambda step: 15 * MiB)
    assert loop.optimizer.spills == 0
    loop.simulated.tell(30 * MiB)  # somebody's, caught
    assert loop.optimizer.spills == 1
    spilled = loop.simulated.state
    loop.run(2, lambda step: 15 * MiB)
    assert max(loop.states[2:]) <= spilled + 3 * 64 * KiB < loop.states[0]
    loop.run(60, lambda step: 15 * MiB)
    assert loop.states[-1] == loop.states[0]  # all of it, and no staging
    assert loop.failures == []
    assert not any(buffer.paged for buffer in loop.optimizer._store.buffers)
    rises = [step for step in range(3, len(loop.states)) if loop.states[step] > loop.states[step - 1]]
    assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(rises))  # one buffer at a time
    said = [r.getMessage() for r in caplog.records if "there was room over 3 steps" in r.getMessage()]
    assert len(said) >= len(rises) - 1 > 5
    assert said[0].endswith("of state moved from the host to cpu")
    named = AdamW(parameters(SHAPES), variant="32bit")
    for steps in (2, 2, 60):
        train(named, steps, first=0)
    assert state_bits(loop.optimizer) == state_bits(named)


def test_what_training_itself_came_to_need_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_on(monkeypatch)
    loop.run(2, lambda step: 15 * MiB)
    loop.run(1, lambda step: 30 * MiB)  # fails once, then fits
    assert loop.states[2] < 200 * KiB  # all of it went
    loop.run(60, lambda step: 15 * MiB)
    assert MiB < loop.states[-1] < loop.states[0] - MiB  # what fits beside it
    loop.run(2, lambda step: 30 * MiB)
    assert loop.failures == [0]


@pytest.mark.slow
def test_a_need_that_comes_again_and_again_is_met_by_ever_longer_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing flaps, even where somebody fails whenever state has come back."""
    loop = loop_on(monkeypatch, quiet=2)
    loop.run(2, lambda step: 15 * MiB)
    loop.simulated.tell(30 * MiB)
    loop.run(1, lambda step: 15 * MiB)
    failures = []
    for step in range(100):
        loop.run(1, lambda step: 15 * MiB)
        if loop.states[-1] > loop.states[-2] + 100 * KiB:
            loop.simulated.tell(30 * MiB)
            failures.append(step)
    gaps = [later - earlier for earlier, later in itertools.pairwise(failures)]
    assert gaps == sorted(gaps)
    assert 3 <= len(failures) <= 6


def test_what_the_plan_paged_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was spilled: the plan had its reasons."""
    monkeypatch.setattr(watch, "QUIET", 5)
    simulated = SimulatedGpu(40 * MiB, 4 * MiB, others=fill(40 * MiB, 1 * MiB))
    install(monkeypatch, simulated)
    loop = Loop(simulated, optimizer_on(simulated))
    loop.run(3, lambda step: 2 * MiB)
    before = simulated.state
    simulated.others = 0
    loop.run(20, lambda step: 2 * MiB)
    assert simulated.state == before > 0


def test_memory_in_pieces_too_small_leaves_state_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_on(monkeypatch)
    loop.run(2, lambda step: 15 * MiB)
    loop.simulated.tell(30 * MiB)
    spilled = loop.simulated.state
    real = buffers.StateBuffer._allocate

    def allocate(self: buffers.StateBuffer) -> dict[str, torch.Tensor]:
        if not self.on_host:
            loop.simulated.tell(self.nbytes)
            raise torch.OutOfMemoryError
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(buffers.StateBuffer, "_allocate", allocate)
        loop.run(10, lambda step: 15 * MiB)
    assert loop.states[-1] <= spilled + 3 * 64 * KiB
    loop.run(10, lambda step: 15 * MiB)
    assert loop.states[-1] > spilled + MiB


def test_state_that_others_put_in_is_kept_by_a_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_on(monkeypatch)
    loop.run(2, lambda step: MiB)
    params = loop.optimizer.param_groups[0]["params"]
    entry = loop.optimizer.state[params[0]]
    entry["exp_avg"] = torch.full_like(entry["exp_avg"], 3.0)
    loop.simulated.tell(38 * MiB)
    assert bool((loop.optimizer.state[params[0]]["exp_avg"] == 3).all())
    assert loop.simulated.state < loop.states[0]


def test_state_that_cannot_come_back_after_an_offload_is_spilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation has failed to allocate while all state was on the host: the next step takes less back."""
    loop = loop_on(monkeypatch, quiet=1000)
    loop.run(2, lambda step: MiB)
    loop.optimizer.offload()
    loop.simulated.tell(2 * MiB)
    set_grads(loop.optimizer.param_groups[0]["params"], 3)
    loop.optimizer.step()
    assert loop.simulated.state <= loop.states[0] - 2 * MiB + 3 * 64 * KiB


def test_a_copy_of_a_spilled_optimizer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_on(monkeypatch)
    loop.run(2, lambda step: 15 * MiB)
    loop.simulated.tell(30 * MiB)
    loop.run(1, lambda step: 15 * MiB)
    twin = copy.deepcopy(loop.optimizer)
    for optimizer in (twin, loop.optimizer):
        train(optimizer, 1, first=5)
    assert state_bits(twin) == state_bits(loop.optimizer)


def test_a_spill_by_another_thread_never_meets_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefetcher's allocations fail again and again, while steps are taken: what it may not move now, it
    moves another time."""
    loop = loop_on(monkeypatch)
    loop.run(1, lambda step: MiB)
    optimizer, ended, moves = loop.optimizer, threading.Event(), [0, 0]

    def prefetch() -> None:
        while not ended.is_set():
            moves[0] += optimizer._spill(CPU, 1) > 0
            moves[1] += optimizer._unspill(CPU, 1 << 30) > 0

    thread = threading.Thread(target=prefetch)
    thread.start()
    try:
        while min(moves) < 20 or len(loop.states) < 20:
            loop.run(1, lambda step: MiB)
    finally:
        ended.set()
        thread.join()
    named = AdamW(parameters(SHAPES), variant="32bit")
    for _ in loop.states:
        train(named, 1, first=0)
    assert state_bits(optimizer) == state_bits(named)


def test_a_step_that_is_being_taken_keeps_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_on(monkeypatch)
    loop.run(1, lambda step: MiB)
    freed: list[int] = []
    with loop.optimizer._store.hold():
        assert loop.optimizer._spill(CPU, 1) == 0  # in this thread
        thread = threading.Thread(target=lambda: freed.append(loop.optimizer._spill(CPU, 1)))
        thread.start()
        thread.join()
    assert freed == [0]
    assert loop.optimizer._spill(CPU, 1) > 0
