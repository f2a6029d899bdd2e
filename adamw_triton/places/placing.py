"""Slots for parameters that have none: in which buffers, resident or paged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton.memory.host import require_host
from adamw_triton.state.buffers import STEPS, Scalars, Slot, make_slots
from adamw_triton.state.formats import Format, as_real, nbytes
from adamw_triton.state.placement import Policy, place


class Wanted(NamedTuple):
    """A parameter that needs a slot."""

    param: Tensor
    name: str
    """What error messages call it."""
    format: Format
    betas: tuple[float, float] = (0.9, 0.999)
    """Of its group."""


def make_places(
    wanted: Sequence[Wanted],
    slots: Mapping[int, Slot],
    policy: Policy,
    limits: Mapping[torch.device, int],
    *,
    scalars: Scalars = STEPS,
) -> tuple[dict[int, Slot], dict[torch.device, int]]:
    """Slots in new buffers, by id of their parameter, where ``slots`` has none or none that will do; and the
    bytes of each device's pages. What has its place keeps it: nothing else would have to be there twice.

    Args:
        limits: budgets of devices from which state was spilled.

    Raises:
        MemoryError: the host's memory is too small.
    """
    # A buffer that one parameter leaves is left by all, or its memory would never be handed back.
    leaving = {
        slot.buffer
        for param, _, state_format, _ in wanted
        if (slot := slots.get(id(param))) and not slot.fits(param, state_format)
    }
    of_device: dict[torch.device, list[tuple[Wanted, bool | None]]] = defaultdict(list)
    for each in wanted:
        slot = slots.get(id(each.param))
        settled = None if slot is None or slot.buffer in leaving else slot.buffer.paged
        of_device[each.param.device].append((each, settled))
    page_bytes: dict[torch.device, int] = {}
    homeless: dict[tuple[torch.device, Format, bool], list[tuple[Tensor, str]]] = defaultdict(list)
    for device, members in of_device.items():
        sizes = [(each.format, as_real(each.param).numel()) for each, _ in members]
        limit = limits.get(device)
        budget = policy.budgets.get(device, policy.budget) if limit is None else limit
        paged = (policy.paged or limit is not None) and device.type != "meta"  # of no memory, so nowhere
        placement = place(sizes, paged, budget, [settled for _, settled in members])
        page_bytes[device] = placement.page_bytes
        for (each, settled), is_paged in zip(members, placement.paged, strict=True):
            if settled is None:
                homeless[device, each.format, is_paged].append((each.param, each.name))
    on_host = sum(
        nbytes(state_format, as_real(param).numel())
        for (_, state_format, is_paged), members in homeless.items()
        for param, _ in members
        if is_paged
    )
    require_host(on_host, "paged optimizer state")
    made = {
        id(slot.param): slot
        for (device, state_format, is_paged), members in homeless.items()
        for some in _grains(members, state_format, policy.grain)
        for slot in make_slots(state_format, some, device, paged=is_paged, scalars=scalars)
    }
    return made, page_bytes


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
