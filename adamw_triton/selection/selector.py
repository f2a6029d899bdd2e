"""Which variant, by the memory that is there: a pure function from sizes and limits to a ``Plan``.

Every candidate is placed by the function that later allocates (``placement.place``), so the bytes that a
plan names are the bytes that are taken. Nothing here measures: ``auto`` does at the first step, and
``planning`` looks ahead before any training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton.choices import Prefer, check_word
from adamw_triton.memory.units import format_bytes
from adamw_triton.selection.plans import Candidate, Limits, Plan
from adamw_triton.state.formats import Format, as_real, format_for, matters, nbytes_of_weights
from adamw_triton.state.placement import SMALLEST_BUDGET, Placement, SumBytes, pages_of, place
from adamw_triton.state.shards import uncut, whole_numel

PAGE_SECONDS = 30e-6
"""What a page costs beside its bytes: launches and events. A guess, not measured; it only tells tiny pages
from large ones."""

LAST_RESORT = 12 << 20
"""Bytes of a ring whose pages cross a link of 11 GB/s in ten times what the host needs for a page."""

SHARED = "gains nothing: that memory is the host's"


class Way(NamedTuple):
    """A way to keep state."""

    name: str
    variant: str
    bits: int
    paged: bool = False
    filled: bool = False
    """Whether what the GPU has room for stays there."""


RESIDENT_32, RESIDENT_8 = Way("32bit", "32bit", 32), Way("8bit", "8bit", 8)
PARTLY_32 = Way("32bit, partly paged", "paged_32bit", 32, paged=True, filled=True)
PARTLY_8 = Way("8bit, partly paged", "paged_8bit", 8, paged=True, filled=True)
PAGED_32 = Way("32bit, paged", "paged_32bit", 32, paged=True)
PAGED_8 = Way("8bit, paged", "paged_8bit", 8, paged=True)

PREFERENCES: dict[Prefer, tuple[Way, ...]] = {
    # Crossing the link costs tens of times what the step does where state is resident, 8 bits an error of
    # 3% of the update: bits go first.
    "speed": (RESIDENT_32, RESIDENT_8, PARTLY_8, PAGED_8, PARTLY_32, PAGED_32),
    "exact": (RESIDENT_32, PARTLY_32, PAGED_32, RESIDENT_8, PARTLY_8, PAGED_8),
}


class Trained(NamedTuple):
    """A parameter with state."""

    numel: int
    """Real elements."""
    dtype: torch.dtype
    """Of the parameter; of complex ones that of their parts."""
    grad_itemsize: int
    state_bits: int | None = None
    """As its group asks."""
    amsgrad: bool = False
    elsewhere: int = 0
    """Real elements that other ranks have of it, in parts."""
    uncut: int = 0
    """See ``format_for``."""

    @classmethod
    def of(cls, param: Tensor, group: Mapping[str, Any]) -> Trained:
        """A parameter of a group; its gradient is of its own dtype unless there is one."""
        grad = param if param.grad is None else param.grad
        dtype, grad_dtype = (tensor.dtype.to_real() for tensor in (param, grad))
        amsgrad = bool(group.get("amsgrad", False))
        here, bits = as_real(param).numel(), group.get("state_bits")
        elsewhere = whole_numel(param) - here
        return cls(here, dtype, grad_dtype.itemsize, bits, amsgrad, elsewhere, uncut(param))

    def format(self, bits: int, block_size: int, weights: str = "nearest") -> Format:
        bits = bits_of(self.state_bits, self.amsgrad, bits)
        numel = self.numel + self.elsewhere
        return format_for(numel, bits, block_size, self.amsgrad, self.dtype, weights, self.uncut)


def bits_of(state_bits: int | None, amsgrad: bool, default: int) -> int:
    """Of a group: its own ``state_bits``, or 32 where amsgrad needs them."""
    return state_bits or (32 if amsgrad else default)


class Demand(NamedTuple):
    """A device, and the parameters whose state goes with it."""

    limits: Limits
    tensors: Sequence[Trained]
    sums: SumBytes = SumBytes()
    """Of gradients, on the host."""
    micro_batches: int = 1
    """Of a step: as often the sums come to the GPU."""


def select(
    demands: Sequence[Demand],
    host_room: int,
    *,
    prefer: Prefer = "speed",
    block_size: int = 128,
    resident: bool = False,
    weights: Sequence[str] = ("nearest",),
    notes: Sequence[str] = (),
) -> Plan:
    """The plan for these devices; ``host_room``: bytes of host memory that may be taken; ``resident``: of
    those ways alone that page nothing; ``weights``: how those of 16 bits may be kept, the best first, and
    each anywhere before the next: see ``formats.WEIGHTS``.

    Raises:
        ValueError: ``prefer`` is none of ``PREFERENCES``.
    """
    check_word("prefer", prefer, tuple(PREFERENCES))
    ways = [way for way in PREFERENCES[prefer] if not (resident and way.paged)]
    dtypes = {tensor.dtype for demand in demands for tensor in demand.tensors}
    differ = any(matters(how, dtype) for how in weights for dtype in dtypes)
    candidates = tuple(
        _evaluate(way, demands, host_room, block_size, how)
        for how in (weights if differ else ("nearest",))
        for way in ways
    )
    return Plan(candidates, prefer, tuple(demand.limits for demand in demands), host_room, tuple(notes))


class _Share(NamedTuple):
    """What a way takes on one device."""

    budget: int | None
    placement: Placement
    seconds: float
    limits: Limits
    weight_bytes: int
    sums: SumBytes

    @property
    def gpu_bytes(self) -> int:
        return 0 if self.limits.shared else self.placement.gpu_bytes + self.sums.staging

    @property
    def host_bytes(self) -> int:
        there = self.placement.gpu_bytes + self.sums.staging if self.limits.shared else 0
        return self.placement.host_bytes + self.sums.host + there


def _evaluate(
    way: Way, demands: Sequence[Demand], host_room: int, block_size: int, weights: str
) -> Candidate:
    shares = [_share(way, demand, block_size, weights) for demand in demands]
    host_bytes = sum(share.host_bytes for share in shares)
    obstacle = _shortage(
        max((share.gpu_bytes - share.limits.room for share in shares if share.gpu_bytes), default=0),
        host_bytes - host_room,
    )
    if way.paged and all(share.limits.shared for share in shares):
        obstacle = SHARED
    return Candidate(
        way.name,
        way.variant,
        way.bits,
        way.paged,
        weights=weights,
        weight_bytes=sum(share.weight_bytes for share in shares),
        gpu_bytes=sum(share.gpu_bytes for share in shares),
        staging_bytes=sum(
            share.placement.ring.nbytes + share.sums.staging for share in shares if share.gpu_bytes
        ),
        host_bytes=host_bytes,
        seconds=max((share.seconds for share in shares), default=0.0),
        obstacle=obstacle,
        budgets=tuple(share.budget for share in shares),
    )


def _share(way: Way, demand: Demand, block_size: int, weights: str) -> _Share:
    limits, tensors, sums, micro_batches = demand
    sizes = [(tensor.format(way.bits, block_size, weights), tensor.numel) for tensor in tensors]
    # Without any room nothing fits, and what is then tried nevertheless should have pages of some size.
    least = SMALLEST_BUDGET if limits.room > 0 else LAST_RESORT
    budget = max(least, limits.room - sums.staging) if way.filled else None
    placement = place(sizes, way.paged and not limits.shared, budget)
    # Weights are read and written, gradients read, state read and written. Paged state crosses the link, both
    # ways at once, while pages that are there are updated; so do sums of gradients, before it in each of the
    # other micro-batches.
    moved = sum(t.numel * (2 * t.dtype.itemsize + t.grad_itemsize) for t in tensors)
    moved += 2 * (placement.resident_bytes + placement.host_bytes)
    pages = pages_of(
        (size for size, paged in zip(sizes, placement.paged, strict=True) if paged), placement.page_bytes
    )
    adding = 0 if limits.shared else sums.host
    crossing = placement.host_bytes + adding
    seconds = max(moved / limits.bandwidth, crossing / limits.link) + PAGE_SECONDS * pages
    seconds += (micro_batches - 1) * adding / limits.link
    weight_bytes = sum(nbytes_of_weights(*size) for size in sizes)
    return _Share(budget, placement, seconds, limits, weight_bytes, sums)


def _shortage(gpu: int, host: int) -> str:
    short = [f"{format_bytes(gpu)} more GPU memory"] if gpu > 0 else []
    short += [f"{format_bytes(host)} more host memory"] if host > 0 else []
    return "needs " + " and ".join(short) if short else ""
