"""Where the state of every parameter is: slots in buffers, resident or paged, and what moves them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from adamw_triton import checkpoint
from adamw_triton.interrupts import DeferredInterrupt
from adamw_triton.memory.host import require_host
from adamw_triton.memory.lasting import lasting
from adamw_triton.paging.device import Device, device_for
from adamw_triton.paging.pager import Pager, Work, join, never
from adamw_triton.places.placing import Wanted, make_places
from adamw_triton.places.shown import Shown, keep_apart, show
from adamw_triton.state.buffers import (
    STEPS,
    Page,
    Scalars,
    Slot,
    State,
    StateBuffer,
    begin_anew,
    make_slots,
    overwritten,
    remember,
)
from adamw_triton.state.formats import nbytes_of_weights
from adamw_triton.state.placement import (
    SMALLEST_BUDGET,
    STAGES,
    Policy,
    largest_page,
    largest_ring,
    page_elements,
    ring_for,
)
from adamw_triton.state.shards import local
from adamw_triton.telemetry.spans import UPDATE, span
from adamw_triton_kernels.work import REMAINDER

_log = logging.getLogger("adamw_triton")


class Store:
    """The state of one optimizer; ``transfer`` and ``beside``: see ``Pager``."""

    def __init__(
        self, policy: Policy, transfer: str, *, scalars: Scalars = STEPS, beside: bool = False
    ) -> None:
        self.policy = policy
        self._scalars = scalars
        self._transfer = transfer
        self._beside = beside
        self.slots: dict[int, Slot] = {}
        """By id of the parameter, which the slot keeps alive."""
        self.buffers: list[StateBuffer] = []
        """In which these are."""
        self.generation = 0
        """Another one whenever a parameter or a page may be in another place than before."""
        self._page_bytes: dict[torch.device, int] = {}
        self._devices: dict[torch.device, Device] = {}
        self._pagers: dict[torch.device, Pager] = {}
        self._spilled: list[StateBuffer] = []
        """In that order."""
        self._limits: dict[torch.device, int] = {}
        """The budgets of GPUs from which state was spilled."""
        self._shown = Shown()
        self._unseen: list[Slot] = []
        """What goes with these exact weights came from elsewhere, and the weights may be still to come."""
        self._lock = threading.RLock()

    def __del__(self) -> None:
        try:
            self._synchronize()  # or the memory would be used anew under a step on another stream
        except Exception:  # in a forked child, or while the interpreter ends
            return

    def page_elements(self, buffer: StateBuffer) -> int:
        """Of a page of the buffer; resident buffers are one page."""
        if buffer.paged:
            return page_elements(buffer.format, self._page_bytes[buffer.device])
        return max(1, buffer.numel)

    # Slots

    @property
    def disturbed(self) -> bool:
        """Whether a ``reserve`` has begun to write and did not come to its end."""
        return self._shown.unfinished and bool(self.slots)

    def intact(self, state: State) -> bool:
        """Whether ``state`` shows our buffers and nothing that someone else put there."""
        return self._shown.intact(state, self.slots)

    def reserve(self, wanted: Sequence[Wanted], state: State) -> None:
        """Give each parameter a slot, and put there what ``state`` shows for it. Others lose theirs.

        All that can fail comes first: new buffers, and what is to be copied over state that is there.

        Raises:
            MemoryError: the host's memory is too small; nothing is changed then.
            RuntimeError: a parameter has changed its shape, or from real to complex; nothing is changed then.
            ValueError: somebody put something else into ``state``; nothing is changed then.
        """
        stateful = {id(want.param) for want in wanted if checkpoint.has_state(state.get(want.param, {}))}
        for param, name, *_ in wanted:
            slot = self.slots.get(id(param))
            if slot is not None and not slot.has_shape_of(param) and id(param) in stateful:
                raise RuntimeError(
                    f"{name} had shape {_shape(slot.shape, slot.is_complex)} when its state was made and has "
                    f"now {_shape(local(param).shape, param.is_complex())}: delete its state (del "
                    "optimizer.state[param]) first"
                )
        with self._still(state):
            self.renew(state)
            made, page_bytes = make_places(
                wanted, self.slots, self.policy, self._limits, scalars=self._scalars
            )
            slots = {id(param): made.get(id(param)) or self.slots[id(param)] for param, *_ in wanted}
            taken = [array for buffer in self.buffers for array in buffer.arrays.values()]
            fresh, kept, left, inexact = [], [], [], 0
            for param, _, _, betas in wanted:
                slot = slots[id(param)]
                if id(param) not in stateful:
                    left.extend([slot] if slot.entry else [])  # someone deleted it: begin anew
                elif id(param) in made:
                    arrival = checkpoint.prepare(state[param], slot, betas, fresh=True)
                    arrival.commit()
                    fresh.append(slot)
                    inexact += arrival.inexact
                elif not slot.is_shown_by(state[param]):
                    kept.append(checkpoint.prepare(state[param], slot, betas, fresh=False, taken=taken))
            keep_apart(self.slots.values(), state)
            self._shown.forget()
            self.generation += 1
            self._page_bytes |= page_bytes
            self.slots, self.buffers = slots, list(dict.fromkeys(slot.buffer for slot in slots.values()))
            show(fresh, state)
            for arrival in kept:
                arrival.commit()
                show([arrival.slot], state)
            for slot in left:
                slot.clear()
            if inexact := inexact + sum(arrival.inexact for arrival in kept):
                _log.warning(
                    "%d weights were kept exactly and are no longer: master_weights is off, or the weights "
                    "have another dtype by now",
                    inexact,
                )
            self._remember(state)
            exact = [slot for slot in slots.values() if slot.format.weights == REMAINDER]
            self._unseen = [slot for slot in exact if slot.entry and slot.version is None]

    def show(self, wanted: Sequence[Wanted], state: State) -> None:
        """Have ``state`` show what parameters without any would begin with, in plain host memory: nothing
        has a place yet."""
        for param, name, state_format, _ in wanted:
            if not checkpoint.has_state(state.get(param, {})):
                slots = make_slots(state_format, [(param, name)], torch.device("cpu"), scalars=self._scalars)
                show(slots, state)

    def attach(self, slots: Sequence[Slot], state: State) -> None:
        """Show in ``state`` the slots that are about to have their first update."""
        fresh = [slot for slot in slots if not slot.entry]
        show(fresh, state)
        if fresh:
            self._remember(state)

    def _remember(self, state: State) -> None:
        self._shown.remember(state)

    # Steps

    def prepare(self, work: Work) -> None:
        """All that a step needs and that can fail: staging buffers."""
        for device, pages in by_device(work).items():
            if device not in self._pagers:
                self._pagers[device] = Pager(self.device(device), self._transfer, beside=self._beside)
            paged = [(b.format, b.numel) for b in self.buffers if b.paged and b.device == device]
            self._pagers[device].prepare(pages, ring_for(paged, self._page_bytes[device]))

    def run(self, work: Work, stop: Callable[[], bool] = never, reads: object = None) -> None:
        """Update all pages: resident ones where they are, while the first of the others come in.

        Args:
            stop: asked before each of these, whether they may stay where they are.
            reads: what updates need, which may be under way until ``join``.
        """
        for page, update in work:
            if not page.buffer.paged:
                with span(UPDATE):
                    update(page.buffer.arrays)
        for device, pages in by_device(work).items():
            self._pagers[device].walk(pages, stop, reads)

    def join(self, devices: Collection[torch.device] | None = None) -> None:
        """What comes next on the current streams, of these devices or of all, happens after their updates."""
        join(self._pagers, devices)

    def fetch(self, pages: Sequence[Page]) -> None:
        """Have pages come in that ``run`` will begin with, most likely."""
        for device, pager in self._pagers.items():
            pager.fetch([page for page in pages if page.buffer.paged and page.buffer.device == device])

    def forget(self) -> None:
        """Whatever was fetched may have been written by others."""
        for pager in self._pagers.values():
            pager.forget()

    def saw_weights(self) -> None:
        """After a step: also those that had no gradient are what they are, whoever writes to them next."""
        remember(self._unseen)
        self._unseen = []

    def finish(self) -> None:
        """Wait until all pages are on the host."""
        for pager in self._pagers.values():
            pager.finish()

    # Between steps

    def renew(self, state: State) -> None:
        """Before ``state`` is read or goes elsewhere: have all pages on the host, and have exact weights that
        somebody else has written since the last step be what is there now, as the next step would."""
        self.finish()
        slots = list(self.slots.values())
        with torch.no_grad():
            begin_anew([slot for slot in overwritten(slots) if slot.is_shown_by(state.get(slot.param))])

    def hold(self) -> AbstractContextManager[bool]:
        """Have nothing moved meanwhile by another thread, and nothing spilled by this one either: an
        allocation that fails in here finds state in use. (The lock itself: Ctrl-C can leave a context that is
        written in Python open, until nobody looks at the exception any more.)"""
        return self._lock

    @contextlib.contextmanager
    def _still(self, state: State) -> Iterator[None]:
        """Around all that moves, replaces or frees state: its GPUs stand still before and after. A step may
        have run on any stream, this may be called under any other, by any thread, and torch's allocator hands
        memory out again by the stream that it was allocated on: so the host waits for all of them, and
        what was left is freed only then. Ctrl-C waits: see ``hold``."""
        with DeferredInterrupt(), self.hold(), lasting():
            left = [(buffer, buffer.arrays) for buffer in self.buffers]
            shown = [list(entry.values()) for entry in state.values() if isinstance(entry, Mapping)]
            self._synchronize()
            try:
                yield
            finally:
                self._synchronize()
                del left, shown

    def _synchronize(self) -> None:
        for device in {buffer.device for buffer in self.buffers}:
            self.device(device).synchronize()

    def device(self, device: torch.device) -> Device:
        """What moves state, or anything else, there."""
        if device not in self._devices:
            self._devices[device] = device_for(device)
        return self._devices[device]

    def on_gpu(self, device: torch.device) -> int:
        """Bytes of state and staging there."""
        resident = sum(buffer.nbytes for buffer in self._resident(device) if not buffer.on_host)
        return resident + self._staging_bytes(device)

    def _staging_bytes(self, device: torch.device) -> int:
        pager = self._pagers.get(device)
        return 0 if pager is None else pager.staging_bytes

    def _resident(self, device: torch.device) -> list[StateBuffer]:
        """Also what waits on the host."""
        return [buffer for buffer in self.buffers if not buffer.paged and buffer.device == device]

    def spill(self, device: torch.device, nbytes: int, wanted: Sequence[Wanted], state: State) -> int:
        """Page out resident state, until it and staging take so many bytes less of a GPU; how many bytes of
        it went: none if the host has no room, or while state is held. Whole buffers go, the last first, and
        nothing else is touched: it takes no memory there."""
        with self._unless_held() as free:
            if not free or not self._resident(device):
                return 0
            self._take_over(wanted, state)
            resident = self._resident(device)
            kept = sum(buffer.nbytes for buffer in resident)
            allowed = kept + self._staging_bytes(device) - nbytes
            going = []
            while resident and kept + largest_ring() > allowed:
                going.append(resident.pop())
                kept -= going[-1].nbytes
            try:
                require_host(sum(b.nbytes for b in going if not b.on_host), "paged optimizer state")
                self._move(going, state, to_host=True, for_good=True)
            except MemoryError as error:
                _log.warning("state has to stay on %s: %s", device, error)
            gone = [buffer for buffer in going if buffer.paged]
            self._spilled += gone
            self._limit(device, allowed)
            return sum(buffer.nbytes for buffer in gone)

    def unspill(self, device: torch.device, room: int, wanted: Sequence[Wanted], state: State) -> int:
        """Take back the buffer that was spilled last, if so many bytes more of a GPU are enough; how many
        bytes of state it were."""
        with self._unless_held() as free:
            if not free:
                return 0
            self._take_over(wanted, state)
            buffer = next((buffer for buffer in reversed(self._spilled) if buffer.device == device), None)
            if buffer is None:
                return 0
            allowed = self.on_gpu(device) + room
            kept = sum(each.nbytes for each in self._resident(device)) + buffer.nbytes
            paging = any(b.paged and b.device == device and b is not buffer for b in self.buffers)
            if kept + paging * largest_ring() > allowed:
                return 0
            self._move([buffer], state, to_host=False, for_good=True)
            self._spilled.remove(buffer)
            self._limit(device, allowed)
            if not paging and device in self._pagers:
                self._pagers[device].free()
            return buffer.nbytes

    @contextlib.contextmanager
    def _unless_held(self) -> Iterator[bool]:
        """Whether state may be moved now, by this thread."""
        mine: bool = self._lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition asks
        free = not mine and self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()

    def _take_over(self, wanted: Sequence[Wanted], state: State) -> None:
        """What others have put into ``state``, before our buffers are shown there again."""
        if not self.intact(state):
            self.reserve(wanted, state)
        self._spilled = [buffer for buffer in self._spilled if buffer in self.buffers]

    def _limit(self, device: torch.device, allowed: int) -> None:
        """While anything is spilled, have pages and what comes later keep within the bytes that state and
        staging are allowed."""
        self._limits.pop(device, None)
        if any(buffer.device == device for buffer in self._spilled):
            kept = sum(buffer.nbytes for buffer in self._resident(device))
            budget = min(kept + largest_ring(), max(allowed, SMALLEST_BUDGET))
            self._limits[device] = budget
            self._page_bytes[device] = min(largest_page(), budget // STAGES)

    def offload(self, state: State) -> None:
        """Take resident state to the host, and hand back the staging buffers.

        Raises:
            MemoryError: the host's memory is too small; nothing is changed then.
        """
        resident = [buffer for buffer in self.buffers if not (buffer.on_host or buffer.device.type == "meta")]
        require_host(sum(buffer.nbytes for buffer in resident), "offloaded optimizer state")
        with self._still(state):
            for pager in self._pagers.values():
                pager.free()
            self._move(resident, state, to_host=True)

    def reload(self, state: State) -> None:
        """Take it back; does nothing if all is in its place."""
        away = [buffer for buffer in self.buffers if buffer.on_host and not buffer.paged]
        if away:
            self._move(away, state, to_host=False)

    def _move(
        self, buffers: Sequence[StateBuffer], state: State, *, to_host: bool, for_good: bool = False
    ) -> None:
        """``for_good``: what is on the host is paged from now on, what is not is resident."""
        with self._still(state):
            self.generation += 1
            try:
                for buffer in buffers:
                    if buffer.on_host != to_host:
                        buffer.move(self.device(buffer.device).compute.copy, to_host=to_host)
                    if for_good:
                        buffer.paged = to_host
            finally:  # also if memory ran out halfway
                show([slot for slot in self.slots.values() if slot.entry], state)
                self._remember(state)

    def memory(self) -> dict[str, int]:
        """Bytes by place, and by format; those of exact weights apart."""
        places = {"gpu": 0, "host": 0, "staging": staging_bytes(self._pagers)}
        formats: dict[str, int] = defaultdict(int)
        for buffer in self.buffers:
            on_gpu = not buffer.on_host and buffer.device.type != "cpu"
            places["gpu" if on_gpu else "host"] += buffer.nbytes
            weights = nbytes_of_weights(buffer.format, buffer.numel)
            formats[buffer.format.name] += buffer.nbytes - weights
            if weights:
                formats["weights"] += weights
        return {**places, **formats}


def _shape(shape: torch.Size, is_complex: bool) -> str:
    return f"{tuple(shape)}{' of complex numbers' if is_complex else ''}"


def staging_bytes(pagers: Mapping[torch.device, Pager]) -> int:
    """On all GPUs; where pages pass through the host's own memory, it is none's."""
    return sum(pager.staging_bytes for device, pager in pagers.items() if device.type != "cpu")


def by_device(work: Work) -> dict[torch.device, Work]:
    """The paged pages."""
    found: dict[torch.device, list[Any]] = defaultdict(list)
    for page, update in work:
        if page.buffer.paged:
            found[page.buffer.device].append((page, update))
    return dict(found)
