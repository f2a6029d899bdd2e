"""The pager's schedule: every legal order of what it queues gives the sequential bits, and none of its waits
could be left out."""

from __future__ import annotations

import ast
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamw_triton.paging import pager
from adamw_triton.paging.pager import Arrays, Pager
from adamw_triton.state.buffers import Page, StateBuffer, make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton.state.placement import Ring, staged_bytes
from tests.amount import WHOLE, asked
from tests.paging.simulated import EveryOrder, SimulatedDevice, random_order

ORDERS = asked("ORDERS", 300)
"""A fault that a missing wait makes is there in some of a hundred: `orders_that_differ`."""


@dataclass(frozen=True)
class Situation:
    """Some steps of a pager. ``steps`` are the pages that each moves; ``rings`` the stages it asks for, of
    which one is a page longer than needed where it is negative; ``ahead`` what is fetched before each: the
    pages that it will begin with, or others; ``looks`` the steps whose pages do not go back."""

    format: Format
    pages: int
    steps: tuple[tuple[int, ...], ...]
    rings: tuple[int, ...]
    transfer: str
    ahead: tuple[tuple[int, ...], ...] = ()
    looks: tuple[int, ...] = ()

    def run(self, device: SimulatedDevice) -> list[bytes]:
        """The state afterwards, as a host that finished waiting finds it; and what was looked at."""
        buffer = self.buffer()
        seen: list[bytes] = []
        pager = Pager(device, self.transfer)
        for number, (step, stages) in enumerate(zip(self.steps, self.rings, strict=True)):
            is_look = number in self.looks
            work = [
                (page, functools.partial(look, seen) if is_look else functools.partial(update, number, page))
                for page in self.cut(buffer, step)
            ]
            stage = staged_bytes(self.format, self.page_elements * (2 if stages < 0 else 1))
            pager.prepare(work, Ring(stage, abs(stages)))
            pager.walk(work, back=not is_look)
            if number < len(self.ahead):
                pager.fetch(self.cut(buffer, self.ahead[number]))
        pager.finish()
        return found(buffer) + seen

    def sequential(self) -> list[bytes]:
        """The state after the same steps without any paging."""
        buffer = self.buffer()
        seen: list[bytes] = []
        for number, step in enumerate(self.steps):
            for page in self.cut(buffer, step):
                if number in self.looks:
                    look(seen, {name: array.clone() for name, array in page.arrays().items()})
                else:
                    update(number, page, page.arrays())
        return found(buffer) + seen

    @property
    def page_elements(self) -> int:
        return 2 * self.format.alignment

    def buffer(self) -> StateBuffer:
        numel = self.pages * self.page_elements - self.format.alignment  # the last page is half one
        buffer = make_slots(self.format, [(torch.empty(numel), "p")], torch.device("cpu"))[0].buffer
        generator = torch.Generator().manual_seed(0)
        for array in buffer.arrays.values():
            array.copy_(torch.randint(-50, 50, array.shape, generator=generator))
        return buffer

    def cut(self, buffer: StateBuffer, pages: Sequence[int]) -> list[Page]:
        size = self.page_elements
        return [Page(buffer, page * size, min((page + 1) * size, buffer.numel)) for page in pages]


def update(step: int, page: Page, arrays: Arrays) -> None:
    """An update that shows if it is given another page's state, or another step's, or runs twice."""
    for array in arrays.values():
        array.copy_(bits(array) * 3 + 7 * step + page.start + 1 & 0x3F)


def look(seen: list[bytes], arrays: Arrays) -> None:
    """Uses the staging buffer for something of its own, too."""
    for array in arrays.values():
        seen.append(array.view(torch.uint8).numpy().tobytes())
        array.fill_(77)


def bits(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32)


def found(buffer: StateBuffer) -> list[bytes]:
    return [array.view(torch.uint8).numpy().tobytes() for array in buffer.arrays.values()]


def steps(pages: int, count: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Sets of pages in order: some miss where no parameter of theirs has a gradient."""
    generator = random.Random(seed)
    return tuple(
        tuple(page for page in range(pages) if generator.random() < 0.8) or (0,) for _ in range(count)
    )


def shuffled(of: tuple[tuple[int, ...], ...], seed: int) -> tuple[tuple[int, ...], ...]:
    """Each step's pages in an order of its own, as buckets come."""
    choose = random.Random(seed)
    return tuple(tuple(choose.sample(pages, len(pages))) for pages in of)


class Freed(Situation):
    """What was fetched is not used, and the memory it comes into goes to somebody else."""

    def run(self, device: SimulatedDevice) -> list[bytes]:
        pager = Pager(device, self.transfer)
        pages = self.cut(self.buffer(), range(self.pages))
        pager.prepare(
            [(page, lambda arrays: None) for page in pages],
            Ring(staged_bytes(self.format, self.page_elements), 3),
        )
        pager.fetch(pages)
        pager.free()
        memory = device.allocate(1 << 10)
        device.compute.run(lambda: memory.fill_(1))
        device.synchronize()
        return [memory.numpy().tobytes()]

    def sequential(self) -> list[bytes]:
        return [b"\1" * (1 << 10)]


class Beside(Situation):
    """Buckets beside a backward: their updates read gradients that it has just made, in memory that it uses
    anew as soon as it may, and write weights that are read when all is joined."""

    def run(self, device: SimulatedDevice) -> list[bytes]:
        buffer, pager = self.buffer(), Pager(device, self.transfer, beside=True)
        weights = torch.zeros(self.pages, dtype=torch.int32)
        seen = torch.zeros_like(weights)
        memory = [torch.zeros(1, dtype=torch.int32) for _ in range(2)]  # a bucket's under way, the next one's
        for number, (step, stages) in enumerate(zip(self.steps, self.rings, strict=True)):
            grad = memory[number % len(memory)]
            device.compute.run(functools.partial(grad.fill_, number))
            pages = self.cut(buffer, step)
            work = [(page, functools.partial(self.learn, grad, weights, page)) for page in pages]
            pager.prepare(work, Ring(staged_bytes(self.format, self.page_elements), stages))
            pager.walk(work, reads=grad)
            if number < len(self.ahead):
                pager.fetch(self.cut(buffer, self.ahead[number]))
        pager.join()
        device.compute.run(lambda: seen.copy_(weights))
        device.synchronize()
        return [*found(buffer), seen.numpy().tobytes()]

    def sequential(self) -> list[bytes]:
        buffer, weights = self.buffer(), torch.zeros(self.pages, dtype=torch.int32)
        for number, step in enumerate(self.steps):
            for page in self.cut(buffer, step):
                self.learn(torch.tensor([number], dtype=torch.int32), weights, page, page.arrays())
        return [*found(buffer), weights.numpy().tobytes()]

    def learn(self, grad: Tensor, weights: Tensor, page: Page, arrays: Arrays) -> None:
        update(int(grad), page, arrays)
        index = page.start // self.page_elements
        weights[index] = weights[index] * 3 + int(grad) + 1 & 0xFFFF


BUCKETS = shuffled(steps(7, 5, 7), 0)
SOME = steps(5, 4, 8)
SITUATIONS = {
    "copies, three stages": Situation(Float32(), 7, steps(7, 3, 0), (3, 3, 3), "copy"),
    "copies, two stages": Situation(Float32(), 5, steps(5, 3, 1), (2, 2, 2), "copy"),
    "copies, one stage": Situation(Float32(), 4, steps(4, 3, 2), (1, 1, 1), "copy"),
    "copies of 8-bit state": Situation(Blockwise8(), 6, steps(6, 3, 3), (3, 3, 3), "copy"),
    "the ring grows": Situation(Blockwise8(256), 5, steps(5, 4, 4), (1, 2, -2, -3), "copy"),
    "in place": Situation(Float32(amsgrad=True), 4, steps(4, 3, 5), (3, 3, 3), "zero_copy"),
    "fetched ahead": Situation(Float32(), 7, BUCKETS, (3,) * 5, "copy", BUCKETS[1:]),
    "fetched in vain": Situation(Float32(), 7, BUCKETS, (3,) * 5, "copy", shuffled(BUCKETS[1:], 1)),
    "fetched into a ring that grows": Situation(
        Float32(), 7, BUCKETS, (1, 2, -2, 3, -3), "copy", BUCKETS[1:] + BUCKETS[:1]
    ),
    "fetched where it then is updated in place": Situation(
        Float32(), 7, (*BUCKETS, *BUCKETS), (3,) * 10, "auto", (*BUCKETS[1:], *BUCKETS[:4])
    ),
    "only looked at": Situation(Float32(), 5, SOME, (3,) * 4, "copy", SOME[1:], looks=(1, 2)),
    "fetched, and given up": Freed(Float32(), 3, (), (), "copy"),
    "beside a backward": Beside(Float32(), 7, BUCKETS, (3,) * 5, "copy"),
    "beside a backward, fetched ahead": Beside(Blockwise8(), 7, BUCKETS, (3,) * 5, "copy", BUCKETS[1:]),
    "beside a backward, in place": Beside(Float32(), 7, BUCKETS, (3,) * 5, "zero_copy"),
    "one way after the other": Situation(Float32(), 5, steps(5, 7, 6), (3,) * 7, "auto"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_random_orders_give_the_sequential_bits(name: str) -> None:
    situation = SITUATIONS[name]
    expected = situation.sequential()
    for seed in range(ORDERS):
        assert situation.run(SimulatedDevice(random_order(seed))) == expected, seed


EVERY = [(5, 2, 1, 377), (4, 3, 1, 341), (5, 3, 1, 2731), (3, 2, 2, 1597), (2, 2, 3, 1597)]


@pytest.mark.parametrize(
    ("pages", "stages", "count", "orders"), [*EVERY, (3, 3, 2, 21846)] if WHOLE else EVERY
)
def test_every_order_gives_the_sequential_bits(pages: int, stages: int, count: int, orders: int) -> None:
    """``orders``: how many there are; with fewer, some overlap would have been lost."""
    situation = Situation(Single(), pages, (tuple(range(pages)),) * count, (stages,) * count, "copy")
    expected = situation.sequential()
    every = EveryOrder()
    for choose in every:
        assert situation.run(SimulatedDevice(choose)) == expected
    assert every.count == orders


class Single(Float32):
    """A format of one array: each page is one copy in, one update, one copy out."""

    @property
    def arrays(self) -> tuple:  # type: ignore[type-arg]
        return super().arrays[:1]


def waits_in_the_source() -> set[int]:
    """Lines of the pager that wait for an event."""
    calls = [
        node for node in ast.walk(ast.parse(Path(pager.__file__).read_text())) if isinstance(node, ast.Call)
    ]
    return {
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and (call.func.attr == "wait" or ast.unparse(call.func) == "self._device.finish")
    }


def orders_that_differ(line: int) -> bool:
    """Whether without the wait of this line some order, or the schedule itself, goes wrong."""
    for situation in SITUATIONS.values():
        expected = situation.sequential()
        for seed in range(100):
            if situation.run(SimulatedDevice(random_order(seed), without=line)) != expected:
                return True
    return False


@pytest.mark.parametrize("line", sorted(waits_in_the_source()))
def test_no_wait_can_be_left_out(line: int) -> None:
    assert orders_that_differ(line)


def test_all_waits_are_tried() -> None:
    """No situation would otherwise show that a wait is needed."""
    tried: set[int] = set()
    for situation in SITUATIONS.values():
        device = SimulatedDevice(random_order(0))
        situation.run(device)
        tried |= device.waited_at
    assert tried == waits_in_the_source()
    assert len(tried) == 12


def test_leaving_out_nothing_changes_nothing() -> None:
    """The mutation test itself: line 0 is no wait."""
    assert not orders_that_differ(0)


def test_memory_is_asked_for_its_kind_once_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each page of each step: a driver's call."""
    situation = SITUATIONS["copies, three stages"]
    buffers = [situation.buffer() for _ in range(2)]
    asked: list[Tensor] = []
    monkeypatch.setattr(SimulatedDevice, "reaches", lambda self, host: asked.append(host) or True)
    pager = Pager(SimulatedDevice(random_order(0)), "auto")
    work = [(page, lambda arrays: None) for buffer in buffers for page in situation.cut(buffer, range(7))]
    for _ in range(3):
        pager.prepare(work, Ring(1 << 12, 3))
    assert sorted(map(id, asked)) == sorted(id(a) for buffer in buffers for a in buffer.arrays.values())
