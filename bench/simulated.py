"""A device that takes time and moves nothing: the pager's own schedule, on streams that are clocks.

Each of its streams is done with what it was given at some second; an event is such a second, and a wait may
put it off. Copies take their bytes over the link's rate with both ways busy, whatever the other way does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Clock:
    """A stream."""

    rate: float = float("inf")
    """Bytes a second of copies."""
    now: float = 0.0

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.take(source.nbytes / self.rate)

    def take(self, seconds: float) -> None:
        """Be busy for so long."""
        self.now += seconds

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> float:
        return self.now

    def wait(self, event: float) -> None:
        self.now = max(self.now, event)


@dataclass
class TimedDevice:
    """``link``: bytes a second each way, both ways at once."""

    link: float
    compute: Clock = field(default_factory=Clock)
    beside: Clock = field(default_factory=Clock)
    inbound: Clock = field(init=False)
    outbound: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.inbound, self.outbound = Clock(self.link), Clock(self.link)

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def finish(self, event: float) -> None:
        self.compute.wait(event)  # the host queues nothing meanwhile, and is not ahead of it

    def synchronize(self) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def reaches(self, host: Tensor) -> bool:
        return False
