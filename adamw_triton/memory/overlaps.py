"""Which tensors share memory, from addresses, sizes and strides: nothing of what they hold is read."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import compress, count, repeat
from operator import add, gt

from torch import Tensor

_NO_ADDRESS = 1 << 64
_CASES = 10_000
"""Differences between two strided tensors that are looked at before they count as sharing memory."""


def span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last; 0 on the meta device, which has no memory."""
    if tensor.is_meta or not tensor.numel():
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.itemsize


class Ranges:
    """The address ranges of some tensors.

    Args:
        starts: their addresses.
        spans: their sizes in bytes, the gaps of strided ones included.
    """

    def __init__(self, starts: Sequence[int], spans: Sequence[int]) -> None:
        self.meeting: list[tuple[int, int]] = []
        """Pairs, by position, whose ranges overlap."""
        self._bounds: list[int] = []
        """Where what is taken begins and ends, in turn. Neighbours are one."""
        ranges = sorted(
            (start, start + size, position)
            for position, (start, size) in enumerate(zip(starts, spans, strict=True))
            if size
        )
        reaching: list[tuple[int, int]] = []
        for start, end, position in ranges:
            reaching = [other for other in reaching if other[0] > start]
            self.meeting.extend((other, position) for _, other in reaching)
            reaching.append((end, position))
            if self._bounds and start <= self._bounds[-1]:
                self._bounds[-1] = max(end, self._bounds[-1])
            else:
                self._bounds += start, end
        self._free_until = [*self._bounds, _NO_ADDRESS]
        """From an address behind so many bounds; in a range from nowhere."""
        self._free_until[1::2] = [0] * (len(self._bounds) // 2)

    def met_by(self, starts: Sequence[int], spans: Sequence[int]) -> list[int]:
        """The positions of those other tensors whose ranges overlap one of these."""
        # In a step whose gradients have moved this is done for each: so without a line of Python for one.
        ends = map(add, starts, spans)
        limits = map(self._free_until.__getitem__, map(bisect_right, repeat(self._bounds), starts))
        return list(compress(count(), map(gt, ends, limits)))


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a byte of one is a byte of the other. Views that interleave, as columns of one matrix do, share
    none. Where strides are so wild that this would take long, the answer is yes."""
    if a.device != b.device or not (span(a) and span(b)):
        return False
    # Each stride, in bytes, times a difference of indices, in bytes between the two: which sums are there?
    differences: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for tensor, side in ((a, 1), (b, 0)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride:
                differences[stride * tensor.itemsize][side] += size - 1
        differences[1][side] += tensor.itemsize - 1
    below = above = 0
    for stride, (down, up) in differences.items():
        below, above = below + stride * down, above + stride * up
    rests = {b.data_ptr() - a.data_ptr()}
    for stride, (down, up) in sorted(differences.items(), reverse=True):
        below, above = below - stride * down, above - stride * up
        left: set[int] = set()
        for rest in rests:
            # What is left must be within what the smaller strides reach.
            first = max(-down, -(-(rest - above) // stride))
            last = min(up, (rest + below) // stride)
            if last - first + len(left) > _CASES:
                return True
            left.update(rest - stride * times for times in range(first, last + 1))
        rests = left
    return bool(rests)
