"""What the optimizer's tests share: a way to step both optimizers on the same gradients."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

SHAPES = ((70, 70), (5000,), (3,), (1,), (40, 2, 60))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def copies(params: Sequence[Parameter]) -> list[Parameter]:
    """Others of the same values."""
    return [Parameter(p.detach().clone()) for p in params]


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict after a trip through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def set_grads(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Each step has its own gradients, which depend on nothing else."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def train(
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    first: int = 1,
    before: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """Step on the steps' gradients; the parameters afterwards."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        set_grads(params, step)
        before(step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [
        t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""
        for t in tensors
    ]


def state_bits(optimizer: torch.optim.Optimizer) -> list[dict[str, bytes]]:
    """The state of every parameter that has some, in the order of the groups, bit for bit."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    entries = (optimizer.state[param] for param in params if param in optimizer.state)
    return [
        dict(zip(entry, bits([torch.as_tensor(value).reshape(-1) for value in entry.values()]), strict=True))
        for entry in entries
    ]
