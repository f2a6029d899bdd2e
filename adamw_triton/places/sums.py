"""Gradients of micro-batches, added up in host memory: their pages come to the GPU, gradients are added, and
they go back.

By pagers of their own beside the store's: these pages are always copied (what adds is torch, which reaches no
host memory), and in the store's staging buffers they would displace the pages of state that were fetched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton.interrupts import DeferredInterrupt
from adamw_triton.memory.host import require_host
from adamw_triton.paging.device import Device
from adamw_triton.paging.pager import Arrays, Pager, Work, join
from adamw_triton.paging.transfer import COPY
from adamw_triton.places.store import by_device, staging_bytes
from adamw_triton.state.buffers import Buffer, Page
from adamw_triton.state.formats import Sum, as_real, round_up
from adamw_triton.state.placement import SumBytes, page_elements, ring_for, sum_bytes
from adamw_triton.step.batch import Piece, cut, in_memory_order
from adamw_triton.step.stepped import Groups
from adamw_triton.tensors import check_grad, check_param, is_trained, named

_KEPT = 1024
"""Sets of parameters of which it is known on which pages their sums are."""
Cut = Sequence[tuple[Page, list[Piece]]]
Part = tuple[int, Tensor]
"""Where on a page a piece of a sum begins, and that piece of its gradient, flat."""
Update = Callable[[Sequence[Part], Sequence[Part], Arrays], None]
"""Of a page: pieces of which there is a sum or a gradient alone, and those of which there are both."""


@dataclass(eq=False)
class Place:
    """Where a parameter's sum is."""

    param: Tensor
    name: str
    """What error messages call it."""
    dtype: torch.dtype
    """Of its gradient."""
    buffer: Buffer
    start: int
    numel: int
    """Real elements."""
    shape: torch.Size
    strides: tuple[int, ...]
    """Of a dense tensor of the parameter's shape as real numbers: the order of the sum in memory."""


class Summing(NamedTuple):
    """How gradients are to add up on the host."""

    dtype: torch.dtype | None
    """Of the sums, which are rounded from it once, at the end; None: that of each gradient."""
    page_bytes: int
    """Of a page in a staging buffer, at most."""


class Sums:
    """Of one optimizer's gradients. They have their memory from the first ``add`` on.

    Args:
        dtype, page_bytes: see ``Summing``.
        device: what pages of tensors there are moved by.
    """

    def __init__(
        self, dtype: torch.dtype | None, page_bytes: int, device: Callable[[torch.device], Device]
    ) -> None:
        self._dtype = dtype
        self._page_bytes = page_bytes
        self._device = device
        self.held: dict[int, Tensor] = {}
        """Parameters that have a sum, by id. Of others nothing is read: whoever clears this begins anew."""
        self._places: dict[int, Place] = {}
        self._pagers: dict[torch.device, Pager] = {}
        self._cuts: dict[tuple[int, ...], Cut] = {}

    @property
    def _buffers(self) -> list[Buffer]:
        return list(dict.fromkeys(place.buffer for place in self._places.values()))

    @property
    def nbytes(self) -> int:
        """On the host."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def staging_bytes(self) -> int:
        """On all GPUs."""
        return staging_bytes(self._pagers)

    def to_come(self, groups: Groups) -> dict[torch.device, SumBytes]:
        """What they will take yet, for the parameters of each device."""
        sizes: dict[torch.device, list[tuple[torch.dtype, int]]] = defaultdict(list)
        for param, _ in named(groups):
            if is_trained(param) and id(param) not in self._places:
                sizes[param.device].append((self._dtype_of(param), as_real(param).numel()))
        found = {device: sum_bytes(some, self._page_bytes) for device, some in sizes.items()}
        for device in found.keys() & self._pagers.keys():
            found[device] = found[device]._replace(staging=0)
        return found

    def add(self, params: Sequence[Tensor], groups: Groups, following: Sequence[Tensor]) -> None:
        """Add the gradients of these parameters to their sums, and drop them. ``following``: whose come next,
        most likely.

        Raises:
            MemoryError, torch.OutOfMemoryError: there is no memory for the sums, or for their pages.
            RuntimeError, TypeError, ValueError: a gradient cannot be added, by the parameter's name.
        """
        absent = [param for param in params if not self._fits(param)]
        if absent:
            self._make_places(absent, groups)
            params = [param for param in params if id(param) in self._places]  # the others are not ours now
        grads = [in_memory_order(p.grad, self._places[id(p)].strides) for p in params if p.grad is not None]
        work = self._work(params, grads, [id(param) in self.held for param in params], _add)
        self._prepare(work)
        with DeferredInterrupt():
            self._walk(work, back=True)
            for param in params:
                if param.grad is not None:
                    self._places[id(param)].dtype = param.grad.dtype
                self.held[id(param)] = param
                param.grad = None
        self._fetch(following)

    def take(
        self,
        params: Sequence[Tensor],
        commit: Callable[[], AbstractContextManager[None]],
        following: Sequence[Tensor],
    ) -> None:
        """Add the sums of these parameters, where they have one, to their gradients, and be done with them.
        Where there is no gradient the sum is it.

        Args:
            commit: around all that is written.

        Raises:
            torch.OutOfMemoryError: there is none for the pages or a gradient.
            RuntimeError: a parameter has changed since.
        """
        params = [param for param in params if id(param) in self.held]
        if not params:
            return
        totals = []
        for param in params:
            if not self._fits(param):
                raise RuntimeError(self._changed(param))
            place, grad = self._places[id(param)], param.grad
            if grad is None:
                dtype, device = place.dtype.to_real(), place.buffer.device
                shape = as_real(param).shape
                totals.append(torch.empty_strided(shape, place.strides, dtype=dtype, device=device))
            else:
                totals.append(in_memory_order(grad, place.strides))
        work = self._work(params, totals, [param.grad is not None for param in params], _total)
        self._prepare(work)
        with commit():
            self._walk(work, back=False)
            self.join({param.device for param in params})  # whoever comes next reads these gradients
            for param, total in zip(params, totals, strict=True):
                del self.held[id(param)]
                if param.grad is None or param.grad.data_ptr() != total.data_ptr():
                    param.grad = torch.view_as_complex(total) if param.is_complex() else total
        self._fetch([param for param in following if id(param) in self.held])

    def join(self, devices: Collection[torch.device] | None = None) -> None:
        """What comes next on the current streams, of these devices or of all, happens after all additions."""
        join(self._pagers, devices)

    def free(self) -> None:
        """Hand back the staging buffers."""
        for pager in self._pagers.values():
            pager.free()

    # Places

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        """Of the sum of such gradients."""
        return self._dtype or tensor.dtype.to_real()

    def _fits(self, param: Tensor) -> bool:
        """Whether the gradient of a parameter, or one of its shape, can be added to the sum in its place."""
        place = self._places.get(id(param))
        if place is None or place.shape != param.shape or place.buffer.device != param.device:
            return False
        grad = param.grad
        if grad is None:
            return True
        return (
            grad.layout is torch.strided
            and grad.shape == param.shape
            and grad.device == param.device
            and grad.is_complex() == param.is_complex()
            and place.buffer.format == Sum(self._dtype_of(grad))
        )

    def _make_places(self, absent: Sequence[Tensor], groups: Groups) -> None:
        """For these parameters, and for all others that will have gradients."""
        these = set(map(id, absent))
        wanted: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, str]]] = defaultdict(list)
        count = 0
        for param, name in named(groups):
            if id(param) in these and param.grad is not None:
                check_param(param, name, stochastic=False)
                check_grad(param, param.grad, name)
                if id(param) in self.held:
                    raise RuntimeError(self._changed(param))
            elif id(param) in self._places or not is_trained(param):
                continue
            dtype = self._dtype_of(param if param.grad is None else param.grad)
            wanted[param.device, dtype].append((param, name))
        for (_, dtype), members in wanted.items():
            count += sum_bytes([(dtype, as_real(param).numel()) for param, _ in members]).host
        require_host(count, "accumulate_on='host', sums of gradients,")
        for (device, dtype), members in wanted.items():
            self._make_buffer(device, Sum(dtype), members)
        self._cuts.clear()

    def _make_buffer(self, device: torch.device, form: Sum, members: Sequence[tuple[Tensor, str]]) -> None:
        starts = [0]
        for param, _ in members:
            starts.append(starts[-1] + round_up(as_real(param).numel(), form.alignment))
        buffer = Buffer(form, device, starts.pop(), paged=True)
        for (param, name), start in zip(members, starts, strict=True):
            real = as_real(param.detach())
            strides = torch.empty_like(real, device="meta").stride()  # in its order, without its gaps
            self._places[id(param)] = Place(
                param, name, param.dtype, buffer, start, real.numel(), param.shape, strides
            )

    def _changed(self, param: Tensor) -> str:
        place = self._places[id(param)]
        return (
            f"{place.name} or its gradient has changed since gradients were added up in host memory: the sum "
            f"is one of {place.dtype} of shape {tuple(place.shape)} on {place.buffer.device}. Drop all sums "
            "by optimizer.zero_grad()"
        )

    # Pages

    def _cut(self, params: Sequence[Tensor]) -> Cut:
        """On which pages their sums are, and where on each."""
        key = tuple(map(id, params))
        found = self._cuts.get(key)
        if found is None:
            places = [self._places[each] for each in key]
            of_buffer: dict[Buffer, list[int]] = defaultdict(list)
            for position, place in enumerate(places):
                of_buffer[place.buffer].append(position)
            found = [
                each
                for buffer, positions in of_buffer.items()
                for each in cut(buffer, positions, places, page_elements(buffer.format, self._page_bytes))
            ]
            if len(self._cuts) >= _KEPT:
                self._cuts.clear()
            self._cuts[key] = found
        return found

    def _work(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], both: Sequence[bool], update: Update
    ) -> Work:
        """``both``: of each parameter, whether there are a sum and a gradient."""
        work = []
        for page, pieces in self._cut(params):
            parts: tuple[list[Part], list[Part]] = [], []
            for piece in pieces:
                dense = grads[piece.position]
                flat = dense.as_strided((piece.numel,), (1,), dense.storage_offset() + piece.first)
                parts[both[piece.position]].append((piece.offset, flat))
            work.append((page, partial(update, *parts)))
        return work

    def _prepare(self, work: Work) -> None:
        for device, pages in by_device(work).items():
            if device not in self._pagers:
                self._pagers[device] = Pager(self._device(device), COPY, beside=True)
            there = [(b.format, b.numel) for b in self._buffers if b.device == device]
            self._pagers[device].prepare(pages, ring_for(there, self._page_bytes))

    def _walk(self, work: Work, *, back: bool) -> None:
        for device, pages in by_device(work).items():
            self._pagers[device].walk(pages, back=back)

    def _fetch(self, params: Sequence[Tensor]) -> None:
        """Have the pages of these come in, if it is known where they are."""
        pages = [page for page, _ in self._cuts.get(tuple(map(id, params)), ())]
        for device, pager in self._pagers.items():
            pager.fetch([page for page in pages if page.buffer.device == device])


def _add(fresh: Sequence[Part], known: Sequence[Part], staged: Arrays) -> None:
    """Gradients into the page, over whatever is there where there is no sum yet."""
    if fresh:
        torch._foreach_copy_(_on(staged, fresh), [grad for _, grad in fresh])
    if known:
        torch._foreach_add_(_on(staged, known), [grad for _, grad in known])


def _total(alone: Sequence[Part], known: Sequence[Part], staged: Arrays) -> None:
    """Sum and gradient in the sum's dtype, as autograd would have added it, then into the gradient: rounded
    once."""
    if known:
        torch._foreach_add_(_on(staged, known), [grad for _, grad in known])
    parts = [*alone, *known]
    torch._foreach_copy_([grad for _, grad in parts], _on(staged, parts))


def _on(staged: Arrays, parts: Sequence[Part]) -> list[Tensor]:
    (page,) = staged.values()
    return [page[at : at + grad.numel()] for at, grad in parts]
