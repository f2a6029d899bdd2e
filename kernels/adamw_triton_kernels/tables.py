"""Small tables that a device reads: sent from pinned memory, and what a CUDA graph needs of them.

A captured graph keeps addresses, not values: whenever it is replayed it reads the tables that it was captured
with, and copies again from host memory what was copied while it was captured. So those are kept, and
nothing is written into them again. Nothing can be pinned during a capture: memory for it is pinned before.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any

import torch
from torch import Tensor

ROOMS = 8
"""Tables that can change in captures between one eager step and the next."""
_DTYPES = {"q": torch.int64, "d": torch.float64}


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and bool(torch.cuda.is_current_stream_capturing())


def stream_of(device: torch.device) -> int:
    """Names the stream that takes what is queued on a device now."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether there is double precision: there is none on Apple's GPUs and on some of Intel's."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.ones(1, dtype=torch.float64, device=device).sqrt_()
    except (TypeError, RuntimeError):
        return False
    return True


def require_eager() -> None:
    """
    Raises:
        RuntimeError: a CUDA graph is being captured, and something has to be compiled or allocated.
    """
    if capturing():
        raise RuntimeError(
            "the first AdamW step on these parameters and gradients cannot be captured in a CUDA graph: take "
            "one before the capture, as torch.cuda.graph's documentation shows, on a side stream"
        )


def send(table: Tensor, device: torch.device) -> Tensor:
    """A host table on the device."""
    if device.type != "cuda":
        return table.to(device)
    # From pinned memory, or the copy would wait for all the work that is queued. The allocator
    # keeps the block until the copy is done.
    return table.pin_memory().to(device, non_blocking=True)


def send_home(table: Tensor) -> tuple[Tensor, Any]:
    """A GPU's table on its way to pinned host memory, and the event after which it is there; any other one
    as it is, and None."""
    if table.device.type != "cuda":
        return table, None
    here = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=True)
    here.copy_(table, non_blocking=True)
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(table.device))
    return here, event


class DeviceTable:
    """A table on a device, sent anew when its values have changed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: tuple[array[int] | array[float], Tensor] | None = None
        """Values and their table: one object, so that an interrupt finds both of one step."""
        self._rooms: list[Tensor] = []
        self._captured: list[Tensor] = []

    def of(self, values: array[int] | array[float], *, capturable: bool = False) -> Tensor:
        """``values`` on the device, one-dimensional.

        Args:
            capturable: be ready for other values, as many, during a capture.
        """
        in_graph = capturable and capturing()
        if self._sent is not None and self._sent[0] == values:
            sent = self._sent[1]
        elif in_graph:  # arrives at every replay, and not before: no later step may count on it
            sent = self._send_in_graph(_tensor(values))
        else:
            sent = send(_tensor(values).clone(), self._device)
            self._sent = (values, sent)
        if in_graph:
            self._captured.append(sent)
        elif capturable and len(self._rooms) < ROOMS:
            pin = self._device.type == "cuda"
            self._rooms = list(
                torch.empty((ROOMS, len(values)), dtype=sent.dtype, device="cpu", pin_memory=pin)
            )
        return sent

    def _send_in_graph(self, table: Tensor) -> Tensor:
        if not self._rooms:
            require_eager()
        room = self._rooms.pop()
        self._captured.append(room)
        _write(room, table)
        return room.to(self._device, non_blocking=True)


def _write(room: Tensor, table: Tensor) -> None:
    """On the host: now, and not at replays."""
    room.copy_(table)


def _tensor(values: array[int] | array[float]) -> Tensor:
    """The same memory."""
    return torch.frombuffer(values, dtype=_DTYPES[values.typecode])
