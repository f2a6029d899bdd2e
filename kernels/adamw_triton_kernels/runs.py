"""How the plain-torch update walks a call's tensors: large ones piece by piece, small ones many at a time.

What torch does with a tensor costs some microseconds however small it is. So small tensors whose state
lies side by side are copied into one scratch tensor, updated together and copied back: a run of elements,
as a piece of a large tensor is one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton_kernels.work import Layout


class Span(NamedTuple):
    """The part of a run that is of one tensor."""

    tensor: int
    """Which of the call's."""
    numel: int
    first: int
    """Index in the whole parameter of its first element."""


class Run(NamedTuple):
    """Elements that are updated together."""

    param: Tensor
    """Flat. The parameter's memory, or of several a copy, which is written back when the next run is asked
    for."""
    grad: Tensor
    row: int
    """Which row of the call's ``hyper_table`` they take."""
    at: slice
    """Of the state arrays."""
    spans: list[Span]


def runs(
    params: Sequence[Tensor], grads: Sequence[Tensor], layout: Layout, longest: int, gathered: int
) -> Iterator[Run]:
    """Every element of a call once, in runs of at most ``longest`` elements of one tensor, or at most
    ``gathered`` of several.

    Parameters share a dtype, and so do gradients. All are taken as they lie in memory, which is dense.
    Whatever has to be allocated is, before the first run is asked for.
    """
    # All views first: between updates, which stream through the caches, making one takes twice as long.
    ps, gs = list(map(_flat, params)), list(map(_flat, grads))
    ranges = list(_neighbours(layout, gathered))
    scratch = [_scratch(n, flat[0], gathered) for n, flat in enumerate((ps, gs)) if len(ranges) < len(ps)]
    return _walk(ps, gs, layout, ranges, longest, scratch)


def _walk(
    ps: list[Tensor],
    gs: list[Tensor],
    layout: Layout,
    ranges: list[tuple[int, int]],
    longest: int,
    scratch: list[Tensor],
) -> Iterator[Run]:
    for begin, end in ranges:
        start, row = layout.offsets[begin], layout.rows[begin]
        if end == begin + 1:
            whole = Span(begin, layout.numels[begin], layout.firsts[begin])
            yield from _pieces(ps[begin], gs[begin], row, start, whole, longest)
        else:
            spans = list(map(Span, range(begin, end), layout.numels[begin:end], layout.firsts[begin:end]))
            yield from _together(ps[begin:end], gs[begin:end], row, start, spans, scratch)


def _pieces(p: Tensor, g: Tensor, row: int, start: int, whole: Span, longest: int) -> Iterator[Run]:
    """Of one tensor; ``start``: of its state."""
    if whole.numel <= longest:
        yield Run(p, g, row, slice(start, start + whole.numel), [whole])
        return
    for begin in range(0, whole.numel, longest):
        end = min(begin + longest, whole.numel)
        span = Span(whole.tensor, end - begin, whole.first + begin)
        yield Run(p[begin:end], g[begin:end], row, slice(start + begin, start + end), [span])


def _together(
    ps: list[Tensor], gs: list[Tensor], row: int, start: int, spans: list[Span], scratch: list[Tensor]
) -> Iterator[Run]:
    """Several tensors at once, in ``scratch``: one for parameters, one for gradients."""
    sizes = [span.numel for span in spans]
    p, g = (tensor[: sum(sizes)] for tensor in scratch)
    torch._foreach_copy_(p.split_with_sizes(sizes), ps)
    torch._foreach_copy_(g.split_with_sizes(sizes), gs)
    yield Run(p, g, row, slice(start, start + sum(sizes)), spans)
    torch._foreach_copy_(ps, p.split_with_sizes(sizes))


def _neighbours(layout: Layout, gathered: int) -> Iterator[tuple[int, int]]:
    """The tensors cut into ranges. Several share one if they take the same row of hyperparameters, their
    state lies side by side without a gap, and they have ``gathered`` elements at most."""
    begin, stop = 0, 0
    places = zip(layout.numels, layout.offsets, layout.rows, strict=True)
    for index, (numel, offset, row) in enumerate(places):
        beside = offset == stop and row == layout.rows[begin]
        stop = offset + numel
        if index and not (beside and stop - layout.offsets[begin] <= gathered):
            yield begin, index
            begin = index
    if layout.numels:
        yield begin, len(layout.numels)


def _scratch(number: int, like: Tensor, numel: int) -> Tensor:
    """The scratch tensor of that number: one for all calls that a thread has prepared, which are made one
    after the other."""
    key = (threading.get_ident(), number, like.device, like.dtype, numel)
    found = _rooms.get(key)
    if found is None:
        found = _rooms[key] = like.new_empty(numel)
    return found


_rooms: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()


def _flat(dense: Tensor) -> Tensor:
    return dense.detach().as_strided((dense.numel(),), (1,))
