"""Where the state of every parameter is: slots in buffers, resident or paged, and what moves them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton import checkpoint
from adamw_triton.interrupts import DeferredInterrupt
from adamw_triton.memory.host import require_host
from adamw_triton.paging.device import device_for
from adamw_triton.paging.pager import Pager, Work
from adamw_triton.state.buffers import Slot, StateBuffer, make_slots
from adamw_triton.state.formats import Format, as_real, nbytes
from adamw_triton.state.placement import SMALLEST_BUDGET, Policy, largest_ring, page_elements, place, ring_for

_log = logging.getLogger("adamw_triton")

State = MutableMapping[Tensor, dict[str, Any]]
"""What users see as ``optimizer.state``: views of our buffers, unless somebody put in something else."""


class Wanted(NamedTuple):
    """A parameter that needs a slot."""

    param: Tensor
    name: str
    """What error messages call it."""
    format: Format
    betas: tuple[float, float] = (0.9, 0.999)
    """Of its group."""


class Store:
    """The state of one optimizer; ``transfer``: one of ``transfer.TRANSFERS``."""

    def __init__(self, policy: Policy, transfer: str) -> None:
        self.policy = policy
        self._transfer = transfer
        self.slots: dict[int, Slot] = {}
        """By id of the parameter, which the slot keeps alive."""
        self._page_bytes: dict[torch.device, int] = {}
        self._pagers: dict[torch.device, Pager] = {}
        self._shown: list[Tensor] | None = None
        self._held = False

    @property
    def buffers(self) -> list[StateBuffer]:
        return list(dict.fromkeys(slot.buffer for slot in self.slots.values()))

    def page_elements(self, buffer: StateBuffer) -> int:
        """Of a page of the buffer; resident buffers are one page."""
        if buffer.paged:
            return page_elements(buffer.format, self._page_bytes[buffer.device])
        return max(1, buffer.numel)

    # Slots

    @property
    def disturbed(self) -> bool:
        """Whether a ``reserve`` has begun to write and did not come to its end."""
        return self._shown is None and bool(self.slots)

    def intact(self, state: State) -> bool:
        """Whether ``state`` shows our buffers and nothing that someone else put there: loaders move its
        tensors about."""
        if self._shown is None:
            return False
        try:
            shown = itertools.chain.from_iterable(map(dict.values, state.values()))
            if all(itertools.starmap(operator.is_, itertools.zip_longest(shown, self._shown))):
                return True
        except TypeError:  # a wrapper's value that is no dict
            pass
        return self._shows_ours(state)

    def _shows_ours(self, state: State) -> bool:
        """The same, where not all is as it was: others keep state of their own there."""
        missing = {id(slot.param) for slot in self.slots.values() if slot.entry}
        for key, entry in state.items():
            slot = self.slots.get(id(key))
            if slot is not None and slot.entry:
                if not slot.is_shown_by(entry):
                    return False
                missing.remove(id(key))
            elif isinstance(key, Tensor) and checkpoint.has_state(entry):
                return False
        if missing:
            return False
        self._remember(state)
        return True

    def reserve(self, wanted: Sequence[Wanted], state: State) -> None:
        """Give each parameter a slot, and put there what ``state`` shows for it. Others lose theirs.

        All that can fail comes first: new buffers, and what is to be copied over state that is there.

        Raises:
            MemoryError: the host's memory is too small; nothing is changed then.
            RuntimeError: a parameter has changed its shape; nothing is changed then.
            ValueError: somebody put something else into ``state``; nothing is changed then.
        """
        stateful = {id(want.param) for want in wanted if checkpoint.has_state(state.get(want.param, {}))}
        for param, name, *_ in wanted:
            slot = self.slots.get(id(param))
            if slot is not None and slot.shape != param.shape and id(param) in stateful:
                raise RuntimeError(
                    f"{name} had shape {tuple(slot.shape)} when its state was made and has now "
                    f"{tuple(param.shape)}: delete its state (del optimizer.state[param]) first"
                )
        self.finish()
        with self.hold():
            paged, page_bytes = self._place(wanted)
            made = self._make_slots(wanted, paged)
            slots = {
                id(want.param): made.get(id(want.param)) or self.slots[id(want.param)] for want in wanted
            }
            taken = [array for buffer in self.buffers for array in buffer.arrays.values()]
            fresh, kept, left = [], [], []
            for param, _, _, betas in wanted:
                slot = slots[id(param)]
                if id(param) not in stateful:
                    left.extend([slot] if slot.entry else [])  # someone deleted it: begin anew
                elif id(param) in made:
                    checkpoint.prepare(state[param], slot, betas, fresh=True).commit()
                    fresh.append(slot)
                elif not slot.is_shown_by(state[param]):
                    kept.append(checkpoint.prepare(state[param], slot, betas, fresh=False, taken=taken))
            self._shown = None  # from here to the end, an interrupted call is begun again
            self.slots = slots
            self._page_bytes.update(page_bytes)
            for slot in fresh:
                show(slot, state)
            for arrival in kept:
                arrival.commit()
                show(arrival.slot, state)
            for slot in left:
                slot.clear()
            self._remember(state)

    def attach(self, slots: Sequence[Slot], state: State) -> None:
        """Show in ``state`` the slots that are about to have their first update."""
        fresh = [slot for slot in slots if not slot.entry]
        for slot in fresh:
            show(slot, state)
        if fresh:
            self._remember(state)

    def _remember(self, state: State) -> None:
        entries = (entry for entry in state.values() if isinstance(entry, Mapping))
        self._shown = [value for entry in entries for value in entry.values()]

    def _place(self, wanted: Sequence[Wanted]) -> tuple[list[bool], dict[torch.device, int]]:
        """Which of them are paged, and the bytes of a page on each device."""
        of_device: dict[torch.device, list[int]] = defaultdict(list)
        for index, want in enumerate(wanted):
            of_device[want.param.device].append(index)
        paged, page_bytes = [False] * len(wanted), {}
        for device, indices in of_device.items():
            sizes = [(wanted[index].format, as_real(wanted[index].param).numel()) for index in indices]
            budget = self.policy.budgets.get(device, self.policy.budget)
            placement = place(sizes, self.policy.paged, budget)
            page_bytes[device] = placement.page_bytes
            for index, is_paged in zip(indices, placement.paged, strict=True):
                paged[index] = is_paged
        return paged, page_bytes

    def _make_slots(self, wanted: Sequence[Wanted], paged: Sequence[bool]) -> dict[int, Slot]:
        """New slots, in new buffers, where the old ones will not do."""
        # A buffer that one parameter leaves is left by all, or its memory would never be handed back.
        leaving = {
            slot.buffer
            for (param, _, state_format, _), is_paged in zip(wanted, paged, strict=True)
            if (slot := self.slots.get(id(param))) and not slot.fits(param, state_format, is_paged)
        }
        homeless: dict[tuple[torch.device, Format, bool], list[tuple[Tensor, str]]] = defaultdict(list)
        for (param, name, state_format, _), is_paged in zip(wanted, paged, strict=True):
            slot = self.slots.get(id(param))
            if slot is None or slot.buffer in leaving:
                homeless[param.device, state_format, is_paged].append((param, name))
        on_host = sum(
            nbytes(state_format, as_real(param).numel())
            for (_, state_format, is_paged), members in homeless.items()
            for param, _ in members
            if is_paged
        )
        require_host(on_host, "paged optimizer state")
        return {
            id(slot.param): slot
            for (device, state_format, is_paged), members in homeless.items()
            for some in _grains(members, state_format, self.policy.grain)
            for slot in make_slots(
                state_format, some, device, paged=is_paged, steps_on_device=self.policy.capturable
            )
        }

    # Steps

    def prepare(self, work: Work) -> None:
        """All that a step needs and that can fail: staging buffers."""
        for device, pages in _by_device(work).items():
            if device not in self._pagers:
                self._pagers[device] = Pager(device_for(device), self._transfer)
            paged = [(b.format, b.numel) for b in self.buffers if b.paged and b.device == device]
            self._pagers[device].prepare(pages, ring_for(paged, self._page_bytes[device]))

    def run(self, work: Work) -> None:
        """Update all pages: resident ones where they are, while the first of the others come in."""
        for page, update in work:
            if not page.buffer.paged:
                update(page.buffer.arrays)
        for device, pages in _by_device(work).items():
            self._pagers[device].walk(pages)

    def finish(self) -> None:
        """Wait until all pages are on the host."""
        for pager in self._pagers.values():
            pager.finish()

    # Between steps

    def on_gpu(self, device: torch.device) -> int:
        """Bytes of state and staging there."""
        pager = self._pagers.get(device)
        resident = sum(buffer.nbytes for buffer in self._resident(device))
        return resident + (0 if pager is None else pager.staging_bytes)

    def _resident(self, device: torch.device) -> list[StateBuffer]:
        return [buffer for buffer in self.buffers if not buffer.on_host and buffer.device == device]

    def spill(self, device: torch.device, nbytes: int, wanted: Sequence[Wanted], state: State) -> int:
        """Page out resident state, until it and staging take so many bytes less of a GPU; how many bytes of
        it went: none if the host has no room, or while state is held. Whole buffers go, the last first: to
        share one out anew it would have to be there twice."""
        if self._held:
            return 0
        resident = self._resident(device)
        before = kept = sum(buffer.nbytes for buffer in resident)
        allowed = self.on_gpu(device) - nbytes
        while resident and kept + largest_ring() > allowed:
            kept -= resident.pop().nbytes
        if kept == before:
            return 0
        budget = min(kept + largest_ring(), max(allowed, SMALLEST_BUDGET))
        policy = self.policy
        self.policy = policy._replace(paged=True, budgets={**policy.budgets, device: budget})
        try:
            self.reserve(wanted, state)
        except MemoryError as error:
            _log.warning("state has to stay on %s: %s", device, error)
            self.policy = policy
            return 0
        return before - sum(buffer.nbytes for buffer in self._resident(device))

    def offload(self, state: State) -> None:
        """Take resident state to the host, and hand back the staging buffers.

        Raises:
            MemoryError: the host's memory is too small; nothing is changed then.
        """
        resident = [buffer for buffer in self.buffers if not buffer.on_host]
        require_host(sum(buffer.nbytes for buffer in resident), "offloaded optimizer state")
        for pager in self._pagers.values():
            pager.free()
        self._move(resident, state, to_host=True)

    def reload(self, state: State) -> None:
        """Take it back; does nothing if all is in its place."""
        away = [buffer for buffer in self.buffers if buffer.on_host and not buffer.paged]
        if away:
            self._move(away, state, to_host=False)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Have nothing spilled meanwhile: an allocation that fails in here finds state in use."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def _move(self, buffers: Sequence[StateBuffer], state: State, *, to_host: bool) -> None:
        with self.hold(), DeferredInterrupt():
            try:
                for buffer in buffers:
                    buffer.move(to_host=to_host)
            finally:  # also if memory ran out halfway
                for slot in self.slots.values():
                    if slot.entry:
                        show(slot, state)
                self._remember(state)

    def memory(self) -> dict[str, int]:
        """Bytes by place and by format."""
        places = {"gpu": 0, "host": 0, "staging": sum(p.staging_bytes for p in self._pagers.values())}
        formats: dict[str, int] = defaultdict(int)
        for buffer in self.buffers:
            on_gpu = not buffer.on_host and buffer.device.type != "cpu"
            places["gpu" if on_gpu else "host"] += buffer.nbytes
            formats[buffer.format.name] += buffer.nbytes
        return {**places, **formats}


def show(slot: Slot, state: State) -> None:
    """Let ``state`` show a slot's memory, beside what others keep there."""
    state[slot.param] = {**slot.attach(), **checkpoint.others_of(state.get(slot.param, {}))}


def _grains(
    members: Sequence[tuple[Tensor, str]], state_format: Format, grain: int | None
) -> Iterator[Sequence[tuple[Tensor, str]]]:
    """The members of each buffer: all in one, or so many that it takes little more than ``grain`` bytes."""
    if grain is None:
        yield members
        return
    start = size = 0
    for index, (param, _) in enumerate(members):
        size += nbytes(state_format, as_real(param).numel())
        if size >= grain or index == len(members) - 1:
            yield members[start : index + 1]
            start, size = index + 1, 0


def _by_device(work: Work) -> dict[torch.device, Work]:
    """The paged pages."""
    found: dict[torch.device, list[Any]] = defaultdict(list)
    for page, update in work:
        if page.buffer.paged:
            found[page.buffer.device].append((page, update))
    return dict(found)
