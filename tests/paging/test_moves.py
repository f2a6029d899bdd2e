"""State that is moved, replaced or freed from any stream, after steps on any other: on the simulated device,
in the orders that its waits allow, and without each of them. Memory that was left is handed out at once."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton.paging.pager import Arrays
from adamw_triton.places import store as module
from adamw_triton.places.placing import Wanted
from adamw_triton.places.store import Store
from adamw_triton.state import placement
from adamw_triton.state.buffers import Page, State, StateBuffer
from adamw_triton.state.formats import Float32
from adamw_triton.state.placement import Policy
from tests.amount import asked
from tests.paging.simulated import Choose, EveryOrder, SimulatedDevice, random_order
from tests.paging.test_schedule import found, update

ORDERS = asked("ORDERS", 40)
CPU = torch.device("cpu")
PARAMETERS, NUMEL = 3, 64

Act = Callable[["Owner"], object]


class Owner:
    """What an optimizer does with its store, each time on a stream of its choice. The first is where all of
    its memory was allocated."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.params = [Parameter(torch.zeros(NUMEL)) for _ in range(PARAMETERS)]
        self.wanted = [Wanted(param, "p", Float32()) for param in self.params]
        self.state: State = {}
        self.store = Store(Policy(paged=False, grain=1), "copy")  # a buffer for each
        self.store.reserve(self.wanted, self.state)
        self.store.attach([self.store.slots[id(param)] for param in self.params], self.state)
        self.steps = 0
        self.left: list[Tensor] = []
        """Memory that was handed back, and belongs to others by now."""

    def on(self, stream: int, act: Act) -> None:
        self.device.compute = self.device.users[stream]
        before = self._resident()
        act(self)
        self.hand_out(before - self._resident())

    def _resident(self) -> set[Tensor]:
        return {a for buffer in self.store.buffers if not buffer.on_host for a in buffer.arrays.values()}

    def hand_out(self, left: set[Tensor]) -> None:
        for array in left:
            self.device.users[0].run(functools.partial(array.view(torch.uint8).fill_, 0xAB))
        self.left += left

    def step(self) -> None:
        self.steps += 1
        work = []
        for buffer in self.store.buffers:
            size = self.store.page_elements(buffer)
            for start in range(0, buffer.numel, size):
                page = Page(buffer, start, min(start + size, buffer.numel))
                work.append((page, functools.partial(self._update, self.steps, page)))
        self.store.prepare(work)
        self.store.run(work)

    def _update(self, step: int, page: Page, arrays: Arrays) -> None:
        """Queued, as a kernel is."""
        now = functools.partial(update, step, page, arrays)
        now() if self.device.running else self.device.compute.run(now)

    def ends(self) -> None:
        self.device.synchronize()
        assert all(bool((array.view(torch.uint8) == 0xAB).all()) for array in self.left)

    # What may come between two steps

    def spill(self) -> None:
        self.store.spill(CPU, 1, self.wanted, self.state)

    def unspill(self) -> None:
        self.store.unspill(CPU, 1 << 30, self.wanted, self.state)

    def offload(self) -> None:
        self.store.offload(self.state)

    def reload(self) -> None:
        self.store.reload(self.state)

    def change(self) -> None:
        """Another format, into which the state is converted."""
        self.wanted = [Wanted(param, "p", Float32(amsgrad=True)) for param in self.params]
        self.store.reserve(self.wanted, self.state)


# Steps and moves, and the stream of each.
SITUATIONS: dict[str, list[tuple[int, Act]]] = {
    "a prefetcher's allocation fails": [
        *[(1, Owner.step), (2, Owner.spill), (1, Owner.step), (2, Owner.spill), (1, Owner.step)],
    ],
    "offloaded under another stream": [
        (1, Owner.step),
        (2, Owner.offload),
        (1, Owner.reload),
        (2, Owner.step),
    ],
    "reloaded under another stream": [
        (0, Owner.step),
        (0, Owner.offload),
        (2, Owner.reload),
        (1, Owner.step),
    ],
    "spilled and taken back": [
        *[(1, Owner.step), (1, Owner.spill), (1, Owner.step), (2, Owner.unspill), (0, Owner.step)],
    ],
    "spilled while offloaded": [
        *[(1, Owner.step), (2, Owner.offload), (2, Owner.spill), (0, Owner.reload), (1, Owner.step)],
    ],
    "converted": [(1, Owner.step), (2, Owner.change), (0, Owner.step)],
}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", 3000)


def run(name: str, choose: Choose) -> list[list[bytes]]:
    device = SimulatedDevice(choose, extra=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "device_for", lambda _: device)
        owner = Owner(device)
        for stream, act in SITUATIONS[name]:
            owner.on(stream, act)
        owner.ends()
        return [found(owner.store.slots[id(param)].buffer)[:2] for param in owner.params]


def sequential(name: str) -> list[list[bytes]]:
    """The steps alone, one after the other: moving changes nothing."""
    buffer = StateBuffer(Float32(), CPU, NUMEL, 1)
    for step in range(1, sum(act is Owner.step for _, act in SITUATIONS[name]) + 1):
        update(step, Page(buffer, 0, NUMEL), buffer.arrays)
    return [found(buffer)] * PARAMETERS


@pytest.mark.parametrize("name", SITUATIONS)
def test_random_orders_give_the_sequential_bits(name: str) -> None:
    expected = sequential(name)
    for seed in range(ORDERS):
        assert run(name, random_order(seed)) == expected, seed


@pytest.mark.parametrize(("name", "orders"), [("spilled while offloaded", 19), ("converted", 1)])
def test_every_order_gives_the_sequential_bits(
    name: str, orders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``orders``: how many there are. Where nothing is paged it is one: all waits are for everything."""
    monkeypatch.setattr(sys.modules[__name__], "PARAMETERS", 2)
    expected = sequential(name)
    every = EveryOrder()
    for choose in every:
        assert run(name, choose) == expected
    assert every.count == orders


def drop(choose: Choose) -> None:
    """An optimizer goes while its last step runs."""
    device = SimulatedDevice(choose, extra=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "device_for", lambda _: device)
        owner = Owner(device)
        owner.on(1, Owner.step)
        left = owner._resident()
        del owner.store
        owner.hand_out(left)
        owner.ends()


def test_an_optimizer_that_goes_leaves_memory_that_nothing_writes_to() -> None:
    for seed in range(ORDERS):
        drop(random_order(seed))


def waits() -> list[int]:
    """Lines of the store that wait for its GPUs."""
    calls = [
        node for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(node, ast.Call)
    ]
    return sorted(call.lineno for call in calls if ast.unparse(call.func) == "self._synchronize")


def goes_wrong(without: int) -> bool:
    """Whether without the wait of this line some order does."""
    real = Store._synchronize

    def synchronize(self: Store) -> None:
        if sys._getframe(1).f_lineno != without:
            real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "_synchronize", synchronize)
        for seed in range(20):
            try:
                if any(run(name, random_order(seed)) != sequential(name) for name in SITUATIONS):
                    return True
                drop(random_order(seed))
            except AssertionError:  # something wrote to memory that was another's
                return True
    return False


@pytest.mark.parametrize("line", waits())
def test_no_wait_can_be_left_out(line: int) -> None:
    assert goes_wrong(line)


def test_all_waits_are_tried_and_leaving_out_none_changes_nothing() -> None:
    assert len(waits()) == 3  # before, after, and when the store goes
    assert not goes_wrong(0)
