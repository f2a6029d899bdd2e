"""What one call of an update is told: hyperparameters, and where each tensor has its state.

Shared by the kernels and the plain-torch twin; imports neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Enough programs that the last wave of them is a small part of the launch, and few enough that their
# table stays under a megabyte however large the model is.
MAX_CHUNKS = 65_536
DITHER_STEP = 0x9E3779B9  # 2**32 / golden ratio: consecutive steps of one element are far apart


class Hyper(NamedTuple):
    """The numbers that one step needs, as the arithmetic uses them; computed in double precision."""

    grad_scale: float
    """What gradients are multiplied by: 1/loss scale, negative to maximize."""
    lerp1: float
    """1 - beta1"""
    lerp2: float
    """1 - beta2"""
    inv_root_correction2: float
    """1/sqrt(1 - beta2**step)"""
    eps: float
    step_size: float
    """lr/(1 - beta1**step)"""
    decay: float
    """lr * weight_decay"""
    phase: int
    """Of the 8-bit code's dither at this step, modulo 2**32."""

    @classmethod
    def at(
        cls,
        step: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_scale: float = 1.0,
    ) -> Hyper:
        """The numbers of the ``step``-th update (the first is 1)."""
        beta1, beta2 = betas
        return cls(
            grad_scale=grad_scale,
            lerp1=1.0 - beta1,
            lerp2=1.0 - beta2,
            inv_root_correction2=1.0 / math.sqrt(1.0 - beta2**step),
            eps=eps,
            step_size=lr / (1.0 - beta1**step),
            decay=lr * weight_decay,
            phase=step * DITHER_STEP % 2**32,
        )


@dataclass(eq=False)
class Layout:
    """Where each of a call's tensors has its state, and which hyperparameters it takes.

    One object serves every step on the same tensors: the launcher keeps its device tables here.
    """

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    """Of the tensor's first element in the state arrays; a multiple of the format's alignment."""
    firsts: tuple[int, ...]
    """Index in the whole parameter of the tensor's first element: 0, unless it is a piece of one."""
    rows: tuple[int, ...]
    """Which of the call's ``Hyper`` it takes."""
    max_chunks: int = MAX_CHUNKS
    """Programs of the launch, at most about."""
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)
