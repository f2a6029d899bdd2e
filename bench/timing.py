"""Seconds: interleaved rounds, medians and spreads, and the bandwidth they are judged by."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

FLUSHED = 256 << 20
"""Bytes written between two timings on a GPU: more than any second-level cache holds."""
COPIED = 256 << 20
"""Bytes of the copy that gives the bandwidth on a CPU, several times its last-level cache."""
COPIED_ON_GPU = 1 << 30
"""There launching a copy of fewer would be a part of its time."""
AHEAD = 10_000_000
"""Cycles of a GPU, over 5 ms: a step of one tensor takes the host less than one."""
COPY = "copy"


@dataclass(frozen=True)
class Spread:
    """Of repeated timings, in seconds."""

    median: float
    low: float
    high: float
    """``low`` and ``high``: the quartiles."""
    min: float
    max: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(statistics.median(seconds), low, high, min(seconds), max(seconds), len(seconds))

    def record(self) -> dict[str, float]:
        return asdict(self)


class Timer:
    """Times a function: by the clock on a CPU; on a GPU by events, with a cold cache.

    Args:
        ahead: let the host run ahead of the GPU, as it does in training, where the GPU is busy with backward
            when a step begins: it is given so much else to do that the host's work is done by then.
    """

    def __init__(self, device: str, *, ahead: bool = False) -> None:
        self.device = device
        self._ahead = ahead and device == "cuda"
        self._dirt = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self, function: Callable[[], object]) -> float:
        if self._dirt is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        self._dirt.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._ahead:
            torch.cuda._sleep(AHEAD)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wall(self, function: Callable[[], object]) -> float:
        """Until the device has done it, compiling and allocating included."""
        start = time.perf_counter()
        function()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, timer: Timer, seed: int = 0
) -> dict[str, Spread]:
    """Each round times every function once, in an order drawn anew: what disturbs the machine for a
    while disturbs them all."""
    order, seconds = list(functions), {name: [] for name in functions}  # type: dict[str, list[float]]
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(timer(functions[name]))
    return {name: Spread.of(values) for name, values in seconds.items()}


def copying(device: str) -> Callable[[], object]:
    """A copy, to be timed beside other work: it moves its bytes twice."""
    source, target = (torch.ones(copied(device) // 4, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def copied(device: str) -> int:
    return COPIED_ON_GPU if device == "cuda" else COPIED


def copy_bandwidth(spread: Spread, device: str) -> float:
    """Bytes a second, reads and writes."""
    return 2 * copied(device) / spread.median
