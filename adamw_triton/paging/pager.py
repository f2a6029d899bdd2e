"""Pages of state in, updated, and out again: the schedule.

    inbound   |copy 0|copy 1|copy 2|copy 3|...
    compute          | upd 0| upd 1| upd 2| upd 3|...
    outbound                |copy 0|copy 1|copy 2|copy 3|

Each page takes the next of a few staging buffers, from one walk to the next. The last pages go out while the
next forward runs, and ``fetch`` has pages come in before their update is known. Beside a backward, updates
have a stream of their own: it goes on while they wait for their pages, until ``join``.

The tests run all this in every order that its waits allow, and without each of them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adamw_triton.memory.units import format_bytes
from adamw_triton.paging.device import Device, Event, Stream
from adamw_triton.paging.transfer import COPY, ZERO_COPY, Choice
from adamw_triton.state.buffers import Buffer, Page
from adamw_triton.state.formats import round_up
from adamw_triton.state.placement import CARVED, SMALLEST_BUDGET, Ring
from adamw_triton.telemetry.spans import PAGE_IN, PAGE_OUT, UPDATE, span

Arrays = Mapping[str, Tensor]
Work = Sequence[tuple[Page, Callable[[Arrays], None]]]
"""Pages, and what updates each, given its arrays where the device has them."""


BESIDE = 1
"""Walks beside a backward that may be under way when another is queued. What they read cannot be freed before
they are done: with one, that is a bucket of gradients while the next one arrives."""


def never() -> bool:
    return False


@dataclass(eq=False)
class Stage:
    """A staging buffer."""

    memory: Tensor
    page: Page | None = None
    """Whose state was here last."""
    left: Event | None = None
    """After it, that is on the host again."""


def join(pagers: Mapping[torch.device, Pager], devices: Collection[torch.device] | None = None) -> None:
    """``Pager.join`` of these devices, or of all."""
    for device, pager in pagers.items():
        if devices is None or device in devices:
            pager.join()


class Pager:
    """Walks the pages of one device. Knows nothing of optimizers: only pages, arrays and updates.

    Args:
        transfer: one of ``choices.TRANSFERS``.
        beside: updates are not to hold up the compute stream, until ``join``.
    """

    _last: Event | None = None
    """After it, all pages are where they belong. Of the class: ``__del__`` finds it even if ``__init__`` was
    interrupted."""

    def __init__(self, device: Device, transfer: str, *, beside: bool = False) -> None:
        self._device = device
        self._beside = beside
        self._under_way: deque[tuple[Event, object]] = deque()
        """Walks beside the compute stream: when their updates are done, and what these read."""
        self._choice = Choice(device, transfer)
        self._transfer = COPY
        self._ring: list[Stage] = []
        self._turn = 0
        self._in_place_until: Event | None = None
        self._ahead: deque[tuple[Stage, Event]] = deque()
        """Stages whose pages have been fetched, and when they are there."""
        self._reached: weakref.WeakKeyDictionary[Buffer, bool] = weakref.WeakKeyDictionary()

    def __del__(self) -> None:
        if self._last is not None:  # before the first walk, nothing is fetched either
            self.finish()  # or the ring's memory would be used anew while pages go out of it

    @property
    def staging_bytes(self) -> int:
        return sum(stage.memory.numel() for stage in self._ring)

    def prepare(self, work: Work, ring: Ring) -> None:
        """Choose the way, and make the staging buffers that it needs: all that can fail before a step.

        Raises:
            torch.OutOfMemoryError: they do not fit.
        """
        self._transfer = self._choice.next(all(map(self._reaches, {page.buffer for page, _ in work})))
        if self._transfer == ZERO_COPY:
            if self._choice.settled:
                self.free()
        elif len(self._ring) < ring.stages or self._ring[0].memory.numel() < ring.stage_bytes:
            self.free()
            self._ring = self._allocate(ring)
            self._device.inbound.wait(self._device.compute.record())  # earlier work may use that memory

    def _reaches(self, buffer: Buffer) -> bool:
        """Asked once: what is paged stays where it is."""
        found = self._reached.get(buffer)
        if found is None:
            found = self._reached[buffer] = all(map(self._device.reaches, buffer.arrays.values()))
        return found

    def walk(
        self, work: Work, stop: Callable[[], bool] = never, reads: object = None, *, back: bool = True
    ) -> None:
        """Queue the updates of all pages. Any order of them would do: no two share an element.

        Args:
            stop: asked before each page, whether the rest need not be updated any more.
            reads: what has to be there until the updates are done.
            back: whether copies of pages go back to the host; False where they are only looked at.
        """
        begin = self._device.compute.record()
        if self._beside:
            self._device.beside.wait(begin)
        try:
            if self._transfer == ZERO_COPY:
                self._in_place(work)
            else:
                self._copying(work, stop, back)
        except BaseException:
            self._device.synchronize()  # what is queued uses memory that may be freed now
            raise
        if self._beside:
            self._under_way.append((self._device.beside.record(), (work, reads)))
            while len(self._under_way) > BESIDE:
                self._device.finish(self._under_way.popleft()[0])
        if stop():
            return  # of what has not moved there is nothing to learn
        nbytes = sum(array.nbytes for page, _ in work for array in page.arrays().values())
        self._choice.ran(self._transfer, nbytes, begin, self._last)

    def join(self) -> None:
        """What comes next on the compute stream happens after all updates."""
        if self._under_way:
            self._device.compute.wait(self._under_way[-1][0])
            self._under_way.clear()

    @property
    def _updates(self) -> Stream:
        return self._device.beside if self._beside else self._device.compute

    def fetch(self, pages: Sequence[Page]) -> None:
        """Have pages come in that the next walk will begin with, as many as there are stages. If it begins
        with others, or ``forget`` is called, they came in vain. Until then nobody else may write them."""
        if self._transfer != COPY:
            return
        for page in pages[: len(self._ring) - len(self._ahead)]:
            if any(_overlap(stage.page, page) for stage, _ in self._ahead):
                return  # it is not what it will be
            self._ahead.append(self._bring(page))

    def forget(self) -> None:
        """What was fetched may not be used any more."""
        while self._ahead:
            self._device.finish(self._ahead.popleft()[1])

    def _bring(self, page: Page) -> tuple[Stage, Event]:
        """Into the next stage."""
        inbound, stage = self._device.inbound, self._ring[self._turn % len(self._ring)]
        self._turn += 1
        if stage.left is not None:
            inbound.wait(stage.left)
        for other in self._ring:
            if other.left is not None and _overlap(other.page, page):
                inbound.wait(other.left)
        stage.page, stage.left = page, None
        arrays = page.arrays()
        staged = carve(stage.memory, arrays)
        with span(PAGE_IN):
            for name in arrays:
                inbound.copy(staged[name], arrays[name])
        return stage, inbound.record()

    def _copying(self, work: Work, stop: Callable[[], bool], back: bool) -> None:
        if self._in_place_until is not None:
            self._device.inbound.wait(self._in_place_until)
            self._in_place_until = None
        updates, outbound = self._updates, self._device.outbound
        for page, update in work:
            if stop():
                break
            if self._ahead and self._ahead[0][0].page != page:
                self._ahead.clear()
            stage, there = self._ahead.popleft() if self._ahead else self._bring(page)
            arrays = page.arrays()
            staged = carve(stage.memory, arrays)
            updates.wait(there)
            with span(UPDATE):
                updates.run(partial(update, staged))
            outbound.wait(updates.record())
            with span(PAGE_OUT):
                for name in arrays if back else ():
                    outbound.copy(arrays[name], staged[name])
            self._last = stage.left = outbound.record()

    def _in_place(self, work: Work) -> None:
        self._ahead.clear()  # what has come in is old
        updates = self._updates
        if self._last is not None:
            updates.wait(self._last)
        for page, update in work:
            with span(UPDATE):
                updates.run(partial(update, page.arrays()))
        self._last = self._in_place_until = updates.record()

    def _allocate(self, ring: Ring) -> list[Stage]:
        try:
            return [Stage(self._device.allocate(ring.stage_bytes)) for _ in range(ring.stages)]
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"paging needs {ring.stages} staging buffers of {format_bytes(ring.stage_bytes)} on the GPU, "
                f"{format_bytes(ring.nbytes)} in all: free GPU memory, or set memory_budget to fewer bytes "
                f"({format_bytes(SMALLEST_BUDGET)} at least). {error}"
            ) from error

    def finish(self) -> None:
        """Wait until all pages are on the host."""
        self.forget()
        if self._last is not None:
            self._device.finish(self._last)

    def free(self) -> None:
        """Hand back the staging buffers."""
        self.finish()
        self._ring = []


def _overlap(one: Page | None, other: Page) -> bool:
    return (
        one is not None and one.buffer is other.buffer and one.start < other.stop and other.start < one.stop
    )


def carve(stage: Tensor, arrays: Arrays) -> dict[str, Tensor]:
    """Room for arrays in a staging buffer."""
    staged = {}
    start = 0
    for name, array in arrays.items():
        staged[name] = stage[start : start + array.nbytes].view(array.dtype)
        start += round_up(array.nbytes, CARVED)
    return staged
