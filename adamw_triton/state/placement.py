"""How much memory state takes, and which of it stays on the GPU: pure functions of sizes.

The optimizer allocates by these very functions, so what they say of a model that does not fit this
machine is what it would take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from adamw_triton.memory.units import format_bytes
from adamw_triton.state.formats import Arranged, Format, Sum, nbytes, round_up

PAGE_BYTES = 32 << 20
"""Of one page at most: over half a millisecond on any link so far, beside which the host's work on a page
disappears. Larger ones take memory, and time: the first page's way in and the last one's way out go alone.
(Of 64 MiB, 8-bit state of 2**28 elements had 84% of an H100's link.)"""
STAGES = 3
"""Pages on the GPU at a time: one comes in, one is updated, one goes out."""
SMALLEST_PAGE = 64 << 10
SMALLEST_BUDGET = STAGES * SMALLEST_PAGE

BUCKET_BYTES = 64 << 20
"""Of gradients that are used up together while backward runs: enough for a launch to be worth its while, and
little beside activations."""

GRAIN = 2048
"""Elements; pages are multiples of it, unless they are smaller: every array of a page then begins at a
multiple of 16 bytes, as the kernels are compiled to expect."""
CARVED = 256
"""Bytes; where an array may begin in a staging buffer."""


class Policy(NamedTuple):
    """Where state may live.

    ``paged``: also in host memory. Then ``budgets`` are the bytes that state and staging may take on a GPU,
    ``budget`` those on a GPU that is not among them; None for staging alone. ``grain``: bytes that are
    spilled at a time, at least; None if there will be no spilling.
    """

    paged: bool
    budget: int | None = None
    budgets: Mapping[torch.device, int | None] = {}
    grain: int | None = None


class Ring(NamedTuple):
    """The staging buffers of one GPU."""

    stage_bytes: int
    stages: int

    @property
    def nbytes(self) -> int:
        return self.stage_bytes * self.stages


class Placement(NamedTuple):
    """Where the state of each of some parameters goes, and the bytes that takes."""

    paged: tuple[bool, ...]
    """Of each parameter."""
    page_bytes: int
    ring: Ring
    resident_bytes: int
    host_bytes: int

    @property
    def gpu_bytes(self) -> int:
        """During a step; the ring stays between steps."""
        return self.resident_bytes + self.ring.nbytes


def place(
    sizes: Sequence[tuple[Format, int]],
    paged: bool,
    budget: int | None = None,
    settled: Sequence[bool | None] | None = None,
) -> Placement:
    """Share out the state of one device's parameters, each of a format and a number of elements.

    All of it is resident unless ``paged``. Then ``budget``, in bytes of the GPU, goes to the ring and,
    in the order of the parameters, to all that still fits; without one everything is paged. ``settled``: of
    each parameter, whether it is paged already, and stays so; None for those that have no place yet.
    """
    needs = [nbytes(*size) for size in sizes]
    settled = [None] * len(sizes) if settled is None else settled
    if not any(settled) and (not paged or (budget is not None and sum(needs) <= budget)):
        return Placement((False,) * len(sizes), PAGE_BYTES, Ring(0, 0), sum(needs), 0)
    page_bytes = PAGE_BYTES if budget is None else min(PAGE_BYTES, budget // STAGES)
    room = sum(needs) if not paged else 0 if budget is None else budget - STAGES * page_bytes
    resident = sum(need for need, is_paged in zip(needs, settled, strict=True) if is_paged is False)
    where = []
    for need, is_paged in zip(needs, settled, strict=True):
        if is_paged is None:
            is_paged = resident + need > room and need > 0
            resident += need * (not is_paged)
        where.append(is_paged)
    totals: dict[Format, int] = {}
    for is_paged, (state_format, numel) in zip(where, sizes, strict=True):
        if is_paged:
            whole = round_up(numel, state_format.alignment)
            totals[state_format] = totals.get(state_format, 0) + whole
    return Placement(
        tuple(where), page_bytes, ring_for(totals.items(), page_bytes), resident, sum(needs) - resident
    )


def page_elements(state_format: Arranged, page_bytes: int) -> int:
    """Elements of a page that takes at most ``page_bytes`` of a staging buffer, if one block does."""
    carving = CARVED * len(state_format.arrays)
    blocks = (page_bytes - carving) // nbytes(state_format, state_format.alignment)
    elements = max(1, blocks) * state_format.alignment
    return elements // GRAIN * GRAIN if elements > GRAIN else elements


def ring_for(buffers: Iterable[tuple[Arranged, int]], page_bytes: int) -> Ring:
    """The ring for paged buffers, each of a format and a number of elements."""
    buffers = list(buffers)
    staged = (staged_bytes(f, min(page_elements(f, page_bytes), numel)) for f, numel in buffers)
    return Ring(max(staged, default=0), min(STAGES, pages_of(buffers, page_bytes)))


def largest_page() -> int:
    """Bytes of a page where there is no need to save."""
    return PAGE_BYTES


def largest_ring() -> int:
    """Bytes of the ring there."""
    return STAGES * PAGE_BYTES


def pages_of(buffers: Iterable[tuple[Arranged, int]], page_bytes: int) -> int:
    """How many pages paged buffers have, each of a format and a number of elements."""
    return sum(-(-numel // page_elements(state_format, page_bytes)) for state_format, numel in buffers)


def staged_bytes(state_format: Arranged, elements: int) -> int:
    """What a page of so many elements takes in a staging buffer."""
    return sum(
        round_up(elements // array.per * array.dtype.itemsize, CARVED) for array in state_format.arrays
    )


def check_budget(budget: int) -> None:
    """Refuse a budget that no ring fits.

    Raises:
        ValueError: with the numbers.
    """
    if budget < SMALLEST_BUDGET:
        raise ValueError(
            f"memory_budget of {format_bytes(budget)} is too small: paging needs a ring of {STAGES} pages of "
            f"at least {format_bytes(SMALLEST_PAGE)}, {format_bytes(SMALLEST_BUDGET)} in all"
        )


class SumBytes(NamedTuple):
    """What sums of gradients in host memory take."""

    host: int = 0
    staging: int = 0


def sum_bytes(sizes: Iterable[tuple[torch.dtype, int]], page_bytes: int | None = None) -> SumBytes:
    """Of one device's parameters, each with the dtype of its sum and a number of elements; ``page_bytes``:
    None where there is no need to save."""
    totals: dict[Arranged, int] = {}
    for dtype, numel in sizes:
        form = Sum(dtype)
        totals[form] = totals.get(form, 0) + round_up(numel, form.alignment)
    ring = ring_for(totals.items(), PAGE_BYTES if page_bytes is None else page_bytes)
    return SumBytes(sum(nbytes(form, numel) for form, numel in totals.items()), ring.nbytes)


def sum_page(budget: int | None) -> int:
    """Bytes of a page of sums where state, staging and these may take ``budget`` of a GPU: half of it at most
    for three of them."""
    return PAGE_BYTES if budget is None else min(PAGE_BYTES, budget // (2 * STAGES))


def live_bytes(gradients: Iterable[int], bucket: int = BUCKET_BYTES) -> int:
    """Of gradients of so many bytes each, those that gradient release lets be there at one time: at most two
    buckets and the largest."""
    sizes = list(gradients)
    return min(sum(sizes), 2 * bucket + max(sizes, default=0))
