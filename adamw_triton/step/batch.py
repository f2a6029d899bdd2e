"""What a step is made of: pages, their launches, the tensors and hyperparameters of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from adamw_triton.paging.pager import Arrays, Work
from adamw_triton.state.buffers import Buffer, Page, Slot, StateBuffer, overwritten, remember
from adamw_triton.state.formats import as_real, round_up
from adamw_triton.step.clipping import GradientNorms, Gradients, Judged
from adamw_triton.step.hyperparameters import Numbers, OnDevice, OnHost, Settings
from adamw_triton.step.statistics import Left
from adamw_triton.step.stepped import Stepped
from adamw_triton_kernels import MAX_CHUNKS, Layout, Update, update_for
from adamw_triton_kernels.tables import capturing, send, stream_of
from adamw_triton_kernels.work import REMAINDER, Addresses, in_turn

PAGE_CHUNKS = 2048
"""Programs of a page's launch, which the link holds up anyway. The tables of all pages stay on the GPU:
so they take a four-thousandth of the state."""


class Item(NamedTuple):
    """A parameter of this step, its gradient and its place."""

    group: int
    slot: Slot
    param: Tensor
    grad: Tensor


class Tensors(NamedTuple):
    """What the updates of a step read and write, in the order of its parameters."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    addresses: Addresses | None = None
    """If it is known where they are."""


def _is_in_order(item: Item) -> bool:
    """Whether an update can read and write the memory of the item's tensors as it is."""
    tensors = (item.param, item.grad)
    return item.slot.contiguous and all(
        t.is_contiguous() and not (t.is_neg() or t._is_zerotensor()) for t in tensors
    )


def in_memory_order(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor as real numbers, with these strides: a copy if it is not so."""
    return _with_strides(as_real(_there(tensor)).resolve_neg(), strides)


def _there(tensor: Tensor) -> Tensor:
    """With memory: autograd may say of a gradient that it is zero, and have none."""
    return tensor.clone() if tensor._is_zerotensor() else tensor


def _copy_back(result: Tensor, param: Tensor) -> None:
    """What was updated into the parameter, unless that is its own memory."""
    if result.data_ptr() != param.data_ptr():
        param.copy_(torch.view_as_complex(result) if param.is_complex() else result)


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides:
        return tensor
    ordered = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return ordered.copy_(tensor)


class Piece(NamedTuple):
    """The part of a parameter whose state is on one page: often all of it."""

    position: int
    """Of the parameter in the step's items."""
    first: int
    """Index of the first element in what is here of the parameter."""
    numel: int
    offset: int
    """Of the first element in the page's arrays."""
    whole: bool

    def of(self, dense: Tensor) -> Tensor:
        """This part of the parameter or its gradient."""
        if self.whole:
            return dense
        return dense.as_strided((self.numel,), (1,), dense.storage_offset() + self.first)


@dataclass(eq=False)
class Launch:
    """The pieces of one page and one pair of dtypes: one call of the format's update."""

    update: Update
    weights: str
    """How they are kept."""
    pieces: list[Piece]
    numbers: Numbers
    max_chunks: int
    like: Arrays
    """The page's arrays, without their memory."""
    places: tuple[int, ...]
    """Of each piece's parameter among those of its device."""
    own_factors: bool
    """Whether each parameter has one, or all the same."""
    firsts: tuple[int, ...]
    """Index in the whole parameter of each piece's first element."""
    layout: Layout | None = None

    def __post_init__(self) -> None:
        self._pick = _picker([piece.position for piece in self.pieces])
        self._whole = all(piece.whole for piece in self.pieces)

    def prepare(
        self, tensors: Tensors, settings: Settings, factors: Tensor | None, left: Left | None
    ) -> Callable[[Arrays], None]:
        """All that can fail of the call, which wants the page's arrays alone."""
        rows, hyper = self.numbers.at_next_step(settings)
        sums = None if left is None else left.told(tensors.params[0].device, self.places, rows, hyper)
        if self.layout is None or self.layout.rows is not rows:
            self.layout = self._lay_out(rows)
        layout = self.layout
        params, grads = self._pick(tensors.params), self._pick(tensors.grads)
        addresses = None
        if not self._whole:
            params, grads = (list(map(Piece.of, self.pieces, each)) for each in (params, grads))
        elif tensors.addresses is not None:
            addresses = self._pick(tensors.addresses[0]), self._pick(tensors.addresses[1])
        return self.update.prepare(
            params, grads, self.like, layout, hyper, self.weights, factors, addresses, sums
        )

    def _lay_out(self, rows: tuple[int, ...]) -> Layout:
        return Layout(
            numels=tuple(piece.numel for piece in self.pieces),
            offsets=tuple(piece.offset for piece in self.pieces),
            firsts=self.firsts,
            rows=rows,
            factors=self.places if self.own_factors else (),
            sums=self.places,
            max_chunks=self.max_chunks,
        )


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the members at these positions out of a sequence."""
    first = positions[0]
    if list(positions) == list(range(first, first + len(positions))):  # for the most part
        return itemgetter(slice(first, first + len(positions)))
    return itemgetter(*positions)


class Batch:
    """The launches of a step on certain parameters, page by page; kept for steps on the same ones.

    Its tables are sent on the current streams, and only there are they replaced and freed, and read but by
    updates beside a backward, for which the pager waits and keeps them. On another stream they might be read
    before they have arrived, and their memory be used anew while they are being read.
    """

    def __init__(self, items: Sequence[Item], page_elements: Callable[[StateBuffer], int]) -> None:
        """``page_elements``: of a page of a buffer; resident buffers are one page."""
        self.slots = [item.slot for item in items]
        self._disordered = [i for i, item in enumerate(items) if not _is_in_order(item)]
        self._streams = {device: stream_of(device) for device in {slot.buffer.device for slot in self.slots}}
        of_buffer: dict[StateBuffer, list[int]] = defaultdict(list)
        for position, slot in enumerate(self.slots):
            of_buffer[slot.buffer].append(position)
        self._counts = [
            (buffer, _ones_at(buffer.steps, [self.slots[position].index for position in positions]))
            for buffer, positions in of_buffer.items()
        ]
        self._exact = [slot for slot in self.slots if slot.format.weights == REMAINDER]
        self._gradients = Gradients(self.slots)
        self._launches: list[tuple[Page, list[Launch]]] = []
        for buffer, positions in of_buffer.items():
            for page, pieces in cut(buffer, positions, self.slots, page_elements(buffer)):
                self._launches.append((page, _launches(buffer, page, pieces, items, self._gradients.places)))

    @property
    def pages(self) -> list[Page]:
        """In the order in which they are updated."""
        return [page for page, _ in self._launches]

    def in_order(self, stepped: Stepped) -> Tensors:
        """What the updates of a step on the same parameters read and write, for the most part what it was
        given."""
        if not self._disordered:
            return Tensors(stepped.params, stepped.grads, stepped.addresses)
        params, grads = list(stepped.params), list(stepped.grads)
        for position in self._disordered:
            for tensors in (params, grads):
                tensors[position] = in_memory_order(tensors[position], self.slots[position].strides)
        return Tensors(params, grads)

    @property
    def copies(self) -> bool:
        """Whether ``copy_back`` has anything to do."""
        return bool(self._disordered)

    def copy_back(self, ordered: Tensors, stepped: Stepped) -> None:
        """Into the parameters what was updated in their stead."""
        for position in self._disordered:
            _copy_back(ordered.params[position], stepped.params[position])

    @property
    def is_here(self) -> bool:
        """Whether its streams are the current ones. What is captured has a stream of its own, but begins when
        all else is done, and keeps what it reads: there any batch will do."""
        return capturing() or all(stream_of(device) == stream for device, stream in self._streams.items())

    def norms(self, ordered: Tensors) -> GradientNorms:
        """Of the gradients."""
        return self._gradients.norms(ordered.grads)

    def left(self) -> Left:
        """Tables for what the updates leave of themselves."""
        return Left(self.slots, self._gradients.of_device, self._gradients.summed)

    def prepare(
        self,
        ordered: Tensors,
        settings: Settings,
        judged: Judged | None = None,
        left: Left | None = None,
    ) -> Work:
        """All that can fail."""

        def factors(page: Page) -> Tensor | None:
            return None if judged is None else judged.factors(page.buffer.device)

        return [
            (page, in_turn([launch.prepare(ordered, settings, factors(page), left) for launch in launches]))
            for page, launches in self._launches
        ]

    def changed(self) -> list[Slot]:
        """Of whose exact weights somebody else has written the visible part since our last step."""
        return overwritten(self._exact)

    def remember(self) -> None:
        """After a step, that the parameters were written, of which kernels tell autograd nothing: a graph
        that saved one of them must not go on with what it is now. And what exact weights are."""
        increment_version([slot.param for slot in self.slots])
        remember(self._exact)

    def count(self, judged: Judged | None = None) -> None:
        """One step more for every parameter, if it is none that is skipped."""
        for buffer, ones in self._counts:
            buffer.steps += ones if judged is None else judged.counted(ones)
        if judged is not None:
            self._gradients.keep(judged)


def _ones_at(steps: Tensor, slots: Sequence[int]) -> Tensor:
    ones = torch.zeros(len(steps), device="cpu")
    ones[slots] = 1
    return send(ones, steps.device)


class Range(Protocol):
    """Of a buffer: what is a parameter's there."""

    @property
    def start(self) -> int: ...

    @property
    def numel(self) -> int: ...


def cut(
    buffer: Buffer, positions: Sequence[int], slots: Sequence[Range], size: int
) -> Iterator[tuple[Page, list[Piece]]]:
    """The pages on which these parameters have something, in order; of those that travel, what is needed."""
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
        if not buffer.paged:  # its arrays are where they are, and pieces are where they are in these
            yield Page(buffer, start, min(start + size, buffer.numel)), pieces
            continue
        first, last = pieces[0].offset, pieces[-1].offset + pieces[-1].numel
        moved = [piece._replace(offset=piece.offset - first) for piece in pieces]
        stop = min(start + round_up(last, buffer.format.alignment), buffer.numel)
        yield Page(buffer, start + first, stop), moved


def _launches(
    buffer: StateBuffer, page: Page, pieces: Sequence[Piece], items: Sequence[Item], places: Sequence[int]
) -> list[Launch]:
    """One for each pair of dtypes. ``places``: of each gradient among those of its device."""
    of_pair: dict[tuple[torch.dtype, torch.dtype], list[Piece]] = defaultdict(list)
    for piece in pieces:
        item = items[piece.position]
        of_pair[item.param.dtype, item.grad.dtype].append(piece)
    numbers = OnDevice if buffer.scalars.on_device else OnHost
    like = page.like()
    return [
        Launch(
            update_for(buffer.format.update, buffer.device),
            buffer.format.weights,
            members,
            numbers(
                [items[piece.position].group for piece in members],
                buffer.steps,
                [items[piece.position].slot.index for piece in members],
            ),
            PAGE_CHUNKS if buffer.paged else MAX_CHUNKS,
            like,
            tuple(places[piece.position] for piece in members),
            buffer.scalars.norms,
            tuple(items[piece.position].slot.first + piece.first for piece in members),
        )
        for members in of_pair.values()
    ]
