"""Small trainings, well and sick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adamw_triton import AdamW
from adamw_triton.demo.corpus import Batches, load_corpus
from adamw_triton.demo.model import ByteTransformer
from adamw_triton.demo.training import LEARNING_RATE, next_byte_loss
from adamw_triton.telemetry.report import Report

CONTEXT = 32
BATCH = 8


def always(step: int) -> float:
    return 1.0


def nothing(step: int, model: nn.Module) -> None:
    pass


def as_it_is(model: nn.Module) -> nn.Module:
    return model


class Run(NamedTuple):
    """How a small transformer is trained."""

    lr: float = LEARNING_RATE
    schedule: Callable[[int], float] = always
    """What lr is multiplied by, at the step."""
    weight_decay: Callable[[int], float] = lambda step: 0.01
    dtype: torch.dtype = torch.float32
    made: Callable[[nn.Module], nn.Module] = as_it_is
    """Of the transformer."""
    before: Callable[[int, nn.Module], None] = nothing
    """Called before the forward of each step."""
    width: int = 32

    def reports(self, steps: int, **arguments: Any) -> Iterator[tuple[int, Report]]:
        """After each step."""
        torch.manual_seed(0)
        model = ByteTransformer(width=self.width, depth=3, heads=2, context=CONTEXT)
        model = self.made(model.to(self.dtype))  # type: ignore[assignment]
        arguments = {"variant": "32bit", **arguments}
        optimizer = AdamW(model.named_parameters(), telemetry=True, **arguments)
        batches = Batches(_text(), BATCH, CONTEXT, seed=0)
        for step in range(1, steps + 1):
            self.before(step, model)
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.schedule(step)
                group["weight_decay"] = self.weight_decay(step)
            loss = next_byte_loss(model, *next(batches))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            yield step, optimizer.diagnose()


@cache
def _text() -> Tensor:
    return load_corpus(1 << 18)


def demo_schedule(steps: int) -> Callable[[int], float]:
    """Up over the first twentieth, then along a cosine to zero."""
    return lambda step: min(20 * step / steps, (1 + math.cos(math.pi * (step - 1) / steps)) / 2)


class Adapted(nn.Module):
    """LoRA (arXiv:2106.09685) beside a layer that is frozen."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + 2 * F.linear(F.linear(x, self.lora_A), self.lora_B)
        return adapted


def adapted(model: nn.Module) -> nn.Module:
    """All its linear layers but the head."""
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Adapted(child))
    return model
