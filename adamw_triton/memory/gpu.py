"""How full a GPU is: what the driver and torch's allocator say, and how far to believe them."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

SLACK_SHARE = 0.02
"""Of a GPU's memory, left free: for kernels that are loaded later, workspaces, blocks rounded up to 2 MiB.
Not measured on a GPU yet."""

_log = logging.getLogger("adamw_triton")


class Snapshot(NamedTuple):
    """Bytes of one GPU's memory."""

    free: int
    """In the driver's eyes: whatever other processes take is gone already."""
    total: int
    reserved: int
    """By this process's allocator, in use or cached."""
    active_peak: int
    """In use at most at one time, ever: during backward, as a rule. Free memory between backward and the
    next forward says nothing about that."""
    fragmented: int
    """Of what was reserved at that time, what no large tensor could have had."""
    retries: int = 0
    """Times that the allocator had to hand back its cache to go on."""
    shared: bool = False
    """Whether the GPU has no memory of its own."""

    @property
    def slack(self) -> int:
        return int(SLACK_SHARE * self.total)

    @property
    def available(self) -> int:
        """To this process. Drivers that swap to the host (WSL) promise more than there is."""
        return min(self.free + self.reserved, self.total)

    @property
    def to_come(self) -> int:
        """What training will take again at its next peak, beyond what is reserved."""
        return max(0, self.active_peak - self.reserved) + self.slack

    def room(self, ours: int = 0) -> int:
        """For state, beside all that training has needed at its peak; ``ours``: the part of the peak that was
        state already."""
        return self.available - (self.active_peak - ours) - self.fragmented - self.slack

    def spent(self, ours: int = 0) -> tuple[tuple[str, int], ...]:
        """How ``room`` comes about, in words."""
        others = self.total - self.available
        training = self.active_peak - ours + self.fragmented
        return (
            ("memory", self.total),
            ("other processes", others),
            ("training's peak", training),
            ("slack", self.slack),
        )


class Allocator(Protocol):
    """What ``auto`` asks of a GPU."""

    name: str

    def snapshot(self) -> Snapshot: ...

    def signs(self) -> tuple[int, int]:
        """The peak and the retries of a snapshot, without asking the driver: looked at in every step."""

    def on_out_of_memory(self, listener: Callable[[int], None]) -> None:
        """Have ``listener``, a method whose object is kept only weakly, told of every allocation that fails:
        how many bytes it was for. Its error is on its way to the user by then."""


class CudaAllocator:
    """torch's caching allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = f"{device} ({torch.cuda.get_device_name(device)})"
        self._shared = bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))

    def snapshot(self) -> Snapshot:
        free, total = torch.cuda.mem_get_info(self._device)
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        peak, retries = _signs(stats)
        unused = max(0, _count(stats, "reserved_bytes", "peak") - peak)
        return Snapshot(
            free,
            total,
            _count(stats, "reserved_bytes", "current"),
            peak,
            0 if _segments_expand() else min(unused, _count(stats, "inactive_split_bytes", "peak")),
            retries,
            self._shared,
        )

    def signs(self) -> tuple[int, int]:
        return _signs(torch.cuda.memory_stats_as_nested_dict(self._device))

    def on_out_of_memory(self, listener: Callable[[int], None]) -> None:
        _listeners.setdefault(self._device.index, []).append(weakref.WeakMethod(listener))
        _observe()


def allocator_for(device: torch.device) -> Allocator | None:
    """None for the CPU."""
    return CudaAllocator(device) if device.type == "cuda" else None


def _signs(stats: Mapping[str, Any]) -> tuple[int, int]:
    # The backend cudaMallocAsync counts no active bytes.
    peak = max(_count(stats, name, "peak") for name in ("active_bytes", "allocated_bytes"))
    return peak, int(stats.get("num_alloc_retries", 0))


def _count(stats: Mapping[str, Any], name: str, kind: str) -> int:
    return int(stats[name]["all"][kind]) if name in stats else 0


def _segments_expand() -> bool:
    """Whether the allocator's segments grow in place, so that splitting them loses nothing."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return any("expandable_segments:true" in setting.lower().replace(" ", "") for setting in settings)


_listeners: dict[int, list[weakref.WeakMethod[Callable[[int], None]]]] = {}
_observed = False


def _observe() -> None:
    """Once a process: torch has no way to end it."""
    global _observed
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is not None and not _observed:
        attach(_tell)
        _observed = True


def _tell(device: int, allocation: int, _allocated: int, _free: int) -> None:
    for reference in list(_listeners.get(device, ())):
        listener = reference()
        if listener is None:
            _listeners[device].remove(reference)
            continue
        try:
            listener(allocation)
        except Exception:  # torch's own error is on its way and must not be replaced
            _log.exception("making room after an out-of-memory error failed")
