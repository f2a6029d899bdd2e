"""What the pager asks of a device: streams that copy and run, and events to order them.

A GPU has four: ``inbound`` and ``outbound`` feed its two copy engines, ``compute`` is torch's current
stream, and ``beside`` takes updates that are not to hold that up. On the CPU everything happens at once. The
tests have a third device, which runs what is queued in any order that the events allow.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from adamw_triton.memory import pinned
from adamw_triton.memory.lasting import lasting
from adamw_triton.telemetry.spans import STAGING, allocated_as

Event = Any
"""A point in a stream; made by ``record``."""


class Stream(Protocol):
    """Does what it is given one after the other, beside other streams."""

    def copy(self, target: Tensor, source: Tensor) -> None: ...

    def run(self, work: Callable[[], None]) -> None: ...

    def record(self) -> Event: ...

    def wait(self, event: Event) -> None:
        """What comes next happens after the event."""


class Device(Protocol):
    @property
    def inbound(self) -> Stream: ...

    @property
    def outbound(self) -> Stream: ...

    @property
    def compute(self) -> Stream: ...

    @property
    def beside(self) -> Stream: ...

    def allocate(self, size: int) -> Tensor:
        """``size`` bytes, which queued work of the compute stream may still use."""

    def finish(self, event: Event) -> None:
        """The host waits for the event."""

    def synchronize(self) -> None:
        """The host waits for everything, whatever stream it is on: also others than these."""

    def seconds(self, begin: Event, end: Event) -> float:
        """Between two events, once the second has happened."""

    def reaches(self, host: Tensor) -> bool:
        """Whether a kernel can read and write this host memory itself."""


def device_for(device: torch.device) -> Device:
    return CudaDevice(device) if device.type == "cuda" else HostDevice()


class CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def copy(self, target: Tensor, source: Tensor) -> None:
        host = source if source.device.type == "cpu" else target
        with torch.cuda.stream(self._stream):
            for part in pinned.registrations(host):
                target[part].copy_(source[part], non_blocking=True)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stream.record_event(event)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)


class CudaDevice:
    """A GPU of NVIDIA's or, as torch calls those too, of AMD's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.inbound, self.outbound, self.beside = (
            CudaStream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        self._has_triton = importlib.util.find_spec("triton") is not None

    @property
    def compute(self) -> CudaStream:
        return CudaStream(torch.cuda.current_stream(self._device))

    @lasting()
    def allocate(self, size: int) -> Tensor:
        with allocated_as(STAGING):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def reaches(self, host: Tensor) -> bool:
        return self._has_triton and host.is_pinned()


class HostStream:
    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> float:
        return time.perf_counter()

    def wait(self, event: float) -> None:
        pass


class HostDevice:
    """The CPU: there is nothing to wait for."""

    def __init__(self) -> None:
        self.inbound = self.outbound = self.compute = self.beside = HostStream()

    @lasting()
    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def finish(self, event: float) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def reaches(self, host: Tensor) -> bool:
        return True
