"""What a step is made of: pages, their launches, the tensors and hyperparameters of each."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton.paging.pager import Arrays, Work
from adamw_triton.state.buffers import Page, Slot, StateBuffer
from adamw_triton.state.formats import as_real
from adamw_triton_kernels import MAX_CHUNKS, Hyper, Layout, Update, update_for

PAGE_CHUNKS = 2048
"""Programs of a page's launch, which the link holds up anyway. The tables of all pages stay on the GPU:
so they take a four-thousandth of the state."""


class Item(NamedTuple):
    """A parameter of this step, its gradient and its place."""

    group: int
    slot: Slot
    param: Tensor
    grad: Tensor


class Pair(NamedTuple):
    """What an update reads and writes: dense, real, in the slot's memory order."""

    param: Tensor
    grad: Tensor


def pair_of(item: Item) -> Pair:
    """The tensors themselves where their memory is in order, else ordered copies.

    A ``param`` that is not ``item.param``'s own memory has to be copied back after the update.
    """
    slot, param, grad = item.slot, item.param, item.grad
    if slot.contiguous and param.is_contiguous() and grad.is_contiguous() and not grad.is_neg():
        return Pair(param, grad)
    return Pair(
        _in_order(as_real(param), slot.strides),
        _in_order(as_real(grad.resolve_conj()).resolve_neg(), slot.strides),
    )


def _in_order(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides:
        return tensor
    ordered = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return ordered.copy_(tensor)


class Piece(NamedTuple):
    """The part of a parameter whose state is on one page: often all of it."""

    position: int
    """Of the parameter in the step's items."""
    first: int
    """Index in the parameter of the first element."""
    numel: int
    offset: int
    """Of the first element in the page's arrays."""
    whole: bool

    def of(self, dense: Tensor) -> Tensor:
        """This part of the parameter or its gradient."""
        if self.whole:
            return dense
        return dense.as_strided((self.numel,), (1,), dense.storage_offset() + self.first)


HyperAt = Callable[[int, int], Hyper]
"""The hyperparameters of a group's parameters at one of their steps."""


@dataclass(eq=False)
class Launch:
    """The pieces of one page and one pair of dtypes: one call of the format's update."""

    update: Update
    pieces: list[Piece]
    groups: list[int]
    """Of each piece."""
    steps: Tensor
    """The buffer's step counts."""
    slots: Tensor
    """Index in ``steps`` of each piece."""
    max_chunks: int
    layout: Layout | None = None
    rows: Sequence[int] = ()
    """The first piece of each row of hyperparameters."""
    leaders: Tensor | None = None
    """For each piece, the first one of its row."""

    def prepare(self, pairs: Sequence[Pair], hyper_at: HyperAt) -> Callable[[Arrays], None]:
        """The call, wanting nothing but the page's arrays."""
        layout, steps = self._lay_out()
        hypers = [hyper_at(self.groups[leader], int(steps[leader]) + 1) for leader in self.rows]
        params = [piece.of(pairs[piece.position].param) for piece in self.pieces]
        grads = [piece.of(pairs[piece.position].grad) for piece in self.pieces]
        return lambda arrays: self.update(params, grads, arrays, layout, hypers)

    def _lay_out(self) -> tuple[Layout, Tensor]:
        """The layout, made anew only if pieces that shared a step count no longer do."""
        steps = self.steps[self.slots]
        if self.layout is None or self.leaders is None or not steps.equal(steps[self.leaders]):
            leader_of: dict[tuple[int, float], int] = {}
            keys = list(zip(self.groups, steps.tolist(), strict=True))
            for position, key in enumerate(keys):
                leader_of.setdefault(key, position)
            self.rows = list(leader_of.values())
            self.leaders = torch.tensor([leader_of[key] for key in keys])
            row_of = {key: row for row, key in enumerate(leader_of)}
            self.layout = Layout(
                numels=tuple(piece.numel for piece in self.pieces),
                offsets=tuple(piece.offset for piece in self.pieces),
                firsts=tuple(piece.first for piece in self.pieces),
                rows=tuple(row_of[key] for key in keys),
                max_chunks=self.max_chunks,
            )
        return self.layout, steps


class Batch:
    """The launches of a step on certain parameters, page by page; kept for steps on the same ones."""

    def __init__(self, items: Sequence[Item], page_elements: Callable[[StateBuffer], int]) -> None:
        """``page_elements``: of a page of a buffer; resident buffers are one page."""
        self.slots = [item.slot for item in items]
        of_buffer: dict[StateBuffer, list[int]] = defaultdict(list)
        for position, slot in enumerate(self.slots):
            of_buffer[slot.buffer].append(position)
        self._counts = [
            (buffer, torch.tensor([self.slots[position].index for position in positions]))
            for buffer, positions in of_buffer.items()
        ]
        self._launches: list[tuple[Page, list[Launch]]] = []
        for buffer, positions in of_buffer.items():
            for page, pieces in _cut(buffer, positions, self.slots, page_elements(buffer)):
                self._launches.append((page, _launches(page, pieces, items)))

    def prepare(self, pairs: Sequence[Pair], groups: Sequence[dict[str, Any]], grad_scale: float) -> Work:
        """All that can fail; ``grad_scale`` multiplies the gradients."""
        hyper_at = functools.cache(lambda group, step: _hyper(groups[group], step, grad_scale))
        return [
            (page, _in_turn([launch.prepare(pairs, hyper_at) for launch in launches]))
            for page, launches in self._launches
        ]

    def count(self) -> None:
        """One step more for every parameter."""
        for buffer, slots in self._counts:
            buffer.steps[slots] += 1


def _in_turn(calls: Sequence[Callable[[Arrays], None]]) -> Callable[[Arrays], None]:
    def update(arrays: Arrays) -> None:
        for call in calls:
            call(arrays)

    return calls[0] if len(calls) == 1 else update


def _cut(
    buffer: StateBuffer, positions: Sequence[int], slots: Sequence[Slot], size: int
) -> Iterator[tuple[Page, list[Piece]]]:
    """The pages on which these parameters have state, in order."""
    pages: dict[int, list[Piece]] = defaultdict(list)
    for position in sorted(positions, key=lambda position: slots[position].start):
        slot = slots[position]
        end = slot.start + slot.numel
        for start in range(slot.start // size * size, end, size):
            begin = max(slot.start, start)
            numel = min(end, start + size) - begin
            if numel:
                whole = numel == slot.numel
                pages[start].append(Piece(position, begin - slot.start, numel, begin - start, whole))
    for start, pieces in pages.items():
        yield Page(buffer, start, min(start + size, buffer.numel)), pieces


def _launches(page: Page, pieces: Sequence[Piece], items: Sequence[Item]) -> list[Launch]:
    """One for each pair of dtypes."""
    buffer = page.buffer
    of_pair: dict[tuple[torch.dtype, torch.dtype], list[Piece]] = defaultdict(list)
    for piece in pieces:
        item = items[piece.position]
        of_pair[item.param.dtype, item.grad.dtype].append(piece)
    return [
        Launch(
            update_for(buffer.format.update, buffer.device),
            members,
            [items[piece.position].group for piece in members],
            buffer.steps,
            torch.tensor([items[piece.position].slot.index for piece in members]),
            PAGE_CHUNKS if buffer.paged else MAX_CHUNKS,
        )
        for members in of_pair.values()
    ]


def _hyper(group: dict[str, Any], step: int, grad_scale: float) -> Hyper:
    beta1, beta2 = group["betas"]
    return Hyper.at(
        step,
        lr=float(group["lr"]),
        betas=(float(beta1), float(beta2)),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        grad_scale=-grad_scale if group["maximize"] else grad_scale,
    )
