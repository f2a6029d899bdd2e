"""A run small enough for a test."""

from __future__ import annotations

from typing import Any

import torch

import adamw_triton


def network(width: int = 64) -> torch.nn.Sequential:
    """Its matrices have 4,096 elements, which 8-bit state takes; its biases do not."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, width))


class Run:
    """A model, its optimizer and steps of both."""

    def __init__(self, **settings: Any) -> None:
        self.model = network()
        settings = {"lr": 1e-2, "variant": "8bit", "telemetry": True, **settings}
        self.optimizer = adamw_triton.AdamW(self.model.named_parameters(), **settings)
        self.steps = 0

    def step(self, poison: float | None = None) -> dict[str, float]:
        """What ``stats(per_param=True)`` says after it; ``poison``: the first gradient begins with it."""
        self.steps += 1
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(self.steps))
        self.model(inputs).square().mean().backward()
        if poison is not None:
            next(self.model.parameters()).grad.view(-1)[0] = poison  # type: ignore[union-attr]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.stats(per_param=True)
