"""How fast host memory reaches the GPU and back, both at once too, and how fast the GPU's own
memory is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from adamw_triton.paging.device import Device, Stream

REPEATS = 4


class Link(NamedTuple):
    """Bytes a second."""

    to_gpu: float
    to_host: float
    both: float
    """Each way, while both are in use."""


def measure(device: Device, hosts: Sequence[Tensor], gpus: Sequence[Tensor]) -> Link:
    """With two equal buffers at either end."""
    to_gpu = (device.inbound, gpus[0], hosts[0])
    to_host = (device.outbound, hosts[1], gpus[1])
    _rate(device, to_gpu, to_host)  # the first copies of a process set things up
    return Link(_rate(device, to_gpu), _rate(device, to_host), _rate(device, to_gpu, to_host))


def copy_rate(device: Device, gpus: Sequence[Tensor]) -> float:
    """Bytes a second that are read or written where one buffer is copied to another on the GPU."""
    way = (device.compute, gpus[0], gpus[1])
    _rate(device, way)
    return 2 * _rate(device, way)


def _rate(device: Device, *ways: tuple[Stream, Tensor, Tensor]) -> float:
    """Of the slower of ``ways`` (stream, target, source), which begin together."""
    device.synchronize()
    begins = [stream.record() for stream, _, _ in ways]
    for _ in range(REPEATS):
        for stream, target, source in ways:
            stream.copy(target, source)
    ends = [stream.record() for stream, _, _ in ways]
    seconds = max(device.seconds(begin, end) for begin, end in zip(begins, ends, strict=True))
    return REPEATS * ways[0][1].nbytes / max(seconds, 1e-9)
