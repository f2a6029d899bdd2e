"""A GPU of a few megabytes: what auto asks of one, and an allocator that never gives more than there is."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from adamw_triton import AdamW
from adamw_triton.memory import gpu
from adamw_triton.memory import host as memory
from adamw_triton.selection import auto
from adamw_triton.state import placement


class SimulatedGpu:
    """``training``: bytes of weights, gradients and all else that stays. What the optimizer holds is asked of
    its store; its state lies on the CPU, where the tests run."""

    name = "simulated"

    def __init__(self, total: int, training: int, *, others: int = 0) -> None:
        self.total = total
        self.training = training
        self.others = others
        self.peak = self.retries = 0
        self.shared = False
        self.optimizer: AdamW | None = None
        self.listeners: list[weakref.WeakMethod[Callable[[int], None]]] = []

    @property
    def state(self) -> int:
        return 0 if self.optimizer is None else self.optimizer._store.on_gpu(torch.device("cpu"))

    def forward(self, activations: int) -> None:
        """And backward."""
        need = self.training + self.state + activations
        if need + self.others > self.total:
            self.tell(activations)
            raise torch.OutOfMemoryError(f"{need + self.others - self.total} bytes too many")
        self.peak = max(self.peak, need)

    def tell(self, size: int) -> None:
        """That an allocation failed."""
        for listener in self.listeners:
            told = listener()
            if told is not None:
                told(size)

    def snapshot(self) -> gpu.Snapshot:
        reserved = max(self.peak, self.training + self.state)
        return gpu.Snapshot(
            self.total - self.others - reserved, self.total, reserved, self.peak, 0, self.retries, self.shared
        )

    def signs(self) -> tuple[int, int]:
        return self.peak, self.retries

    def on_out_of_memory(self, listener: Callable[[int], None]) -> None:
        self.listeners.append(weakref.WeakMethod(listener))


def install(
    monkeypatch: pytest.MonkeyPatch, simulated: SimulatedGpu, *, host: int = 1 << 40, pages: int = 1 << 16
) -> None:
    """Have the optimizers take ``simulated`` for the device of CPU tensors."""
    monkeypatch.setattr(gpu, "allocator_for", lambda device: simulated)
    for module in (auto, memory):
        monkeypatch.setattr(module, "host_limit", lambda: memory.Limit(host, "the control group /jail"))
    monkeypatch.setattr(placement, "PAGE_BYTES", pages)
    monkeypatch.setattr(auto, "SPILLED_AT_ONCE", 1 << 18)
