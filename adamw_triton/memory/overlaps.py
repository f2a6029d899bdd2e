"""Which tensors share memory, from addresses, sizes and strides: nothing of what they hold is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

_NO_ADDRESS = (1 << 63) - 1
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
        bounds: list[int] = []
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
            if bounds and start <= bounds[-1]:
                bounds[-1] = max(end, bounds[-1])
            else:
                bounds += start, end
        free_until = [*bounds, _NO_ADDRESS]
        free_until[1::2] = [0] * (len(bounds) // 2)
        self._bounds = torch.tensor(bounds, dtype=torch.int64, device="cpu")
        """Where what is taken begins and ends, in turn. Neighbours are one."""
        self._free_until = torch.tensor(free_until, dtype=torch.int64, device="cpu")
        """From an address behind so many bounds; in a range from nowhere."""

    def met_by(self, starts: Tensor, spans: Tensor) -> list[int]:
        """The positions of those other tensors whose ranges overlap one of these. Both are int64."""
        # In a step whose gradients have moved this is done for each: so without a line of Python for one.
        limits = self._free_until[torch.searchsorted(self._bounds, starts, right=True)]
        met: list[int] = (starts + spans > limits).nonzero().flatten().tolist()
        return met


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
