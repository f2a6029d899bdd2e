"""A device that runs what is queued on its streams in any order that the events allow.

Nothing runs while it is queued. ``finish`` lets operations happen, one at a time, each from a stream that a
``choose`` function picks among those that may go on; it stops as soon as the event has happened, and the
rest stays queued. So one seed is one legal order, and a choice tree is all of them.
"""

from __future__ import annotations

import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton.paging import pager

Choose = Callable[[int], int]
"""Which of n streams goes on."""


@dataclass(eq=False)
class Event:
    happened: bool = False


class Operation(NamedTuple):
    """Work, or if there is none a wait for an event or its happening."""

    work: Callable[[], object] | None = None
    wait_for: Event | None = None
    happens: Event | None = None


class Stream:
    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self.queue: deque[Operation] = deque()

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.queue.append(Operation(lambda: target.copy_(source)))

    def run(self, work: Callable[[], None]) -> None:
        self.queue.append(Operation(work))

    def record(self) -> Event:
        event = Event()
        self.queue.append(Operation(happens=event))
        return event

    def wait(self, event: Event) -> None:
        if self._device.waits():
            self.queue.append(Operation(wait_for=event))

    def settle(self) -> bool:
        """Pass all events that can be passed, and say whether any was."""
        passed = False
        while self.queue and self.queue[0].work is None:
            _, wait_for, happens = self.queue[0]
            if wait_for is not None and not wait_for.happened:
                break
            if happens is not None:
                happens.happened = True
            self.queue.popleft()
            passed = True
        return passed


@dataclass(eq=False)
class SimulatedDevice:
    """Args:
    choose: the order.
    without: the line of ``pager.py`` whose waits are left out.
    extra: streams of the user's beside the first, for ``compute``, which is whichever is current.
    """

    choose: Choose
    without: int | None = None
    extra: int = 0
    inbound: Stream = field(init=False)
    outbound: Stream = field(init=False)
    compute: Stream = field(init=False)
    beside: Stream = field(init=False)
    waited_at: set[int] = field(default_factory=set)
    _rates: Iterator[float] = field(default_factory=lambda: iter((1.0, 1.0, 2.0, 2.0)))

    def __post_init__(self) -> None:
        self.inbound, self.outbound, self.compute, self.beside = (Stream(self) for _ in range(4))
        self.users = [self.compute, *(Stream(self) for _ in range(self.extra))]
        self.running = False
        """Whether something queued runs now."""
        self._memory = torch.zeros(1 << 16, dtype=torch.uint8)
        self._allocated: list[tuple[weakref.ref[Tensor], int]] = []

    @property
    def streams(self) -> list[Stream]:
        return [self.inbound, *self.users, self.outbound, self.beside]

    def waits(self) -> bool:
        """Whether the line of the pager that calls is to be heeded."""
        frame = sys._getframe(2)
        while frame.f_code.co_filename != pager.__file__:
            assert frame.f_back is not None
            frame = frame.f_back
        self.waited_at.add(frame.f_lineno)
        return frame.f_lineno != self.without

    def allocate(self, size: int) -> Tensor:
        """Memory of its own, the lowest that is free, as torch's allocator would hand out again. Its last
        owner's kernels are still queued on the compute stream and write to it."""
        self._allocated = [(tensor, end) for tensor, end in self._allocated if tensor() is not None]
        start = max((end for _, end in self._allocated), default=0)
        tensor = self._memory[start : start + size]
        assert len(tensor) == size
        self._allocated.append((weakref.ref(tensor), start + size))
        rest = tensor.data_ptr() - self._memory.data_ptr()
        self.compute.run(lambda: self._memory[rest : rest + size].fill_(0xAB))
        return tensor

    def finish(self, event: Event) -> None:
        if self.waits():
            while not event.happened:
                self._go_on()

    def synchronize(self) -> None:
        while any(stream.queue for stream in self.streams):
            self._go_on()

    def seconds(self, begin: Event, end: Event) -> float:
        return next(self._rates)

    def reaches(self, host: Tensor) -> bool:
        return True

    def _go_on(self) -> None:
        """One piece of work of a stream that may do one."""
        while any([stream.settle() for stream in self.streams]):
            pass
        ready = [stream for stream in self.streams if stream.queue and stream.queue[0].work is not None]
        if not ready:
            assert not any(stream.queue for stream in self.streams), "every stream waits for another"
            return
        work = ready[self.choose(len(ready)) if len(ready) > 1 else 0].queue.popleft().work
        assert work is not None
        self.running = True
        with torch.no_grad():  # as where it was queued
            work()
        self.running = False
        while any([stream.settle() for stream in self.streams]):
            pass


def random_order(seed: int) -> Choose:
    """Streams that run at their own, changing speeds."""
    generator = random.Random(seed)
    favourite = [0]

    def choose(n: int) -> int:
        if generator.random() < 0.2:
            favourite[0] = generator.randrange(3)
        return favourite[0] % n if generator.random() < 0.7 else generator.randrange(n)

    return choose


class EveryOrder:
    """Iterates over all orders: each is a function to choose by, and the next one differs in the last choice
    that had another option left."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[Choose]:
        taken: list[int] = []
        while True:
            options: list[int] = []
            self.count += 1
            yield self._along(taken, options)
            taken += [0] * (len(options) - len(taken))
            while taken and taken[-1] == options[len(taken) - 1] - 1:
                taken.pop()
            if not taken:
                return
            taken[-1] += 1

    @staticmethod
    def _along(taken: list[int], options: list[int]) -> Choose:
        path = list(taken)

        def choose(n: int) -> int:
            options.append(n)
            return path[len(options) - 1] if len(options) <= len(path) else 0

        return choose
