"""Ways to train 16-bit weights that are compared, each behind ``build(parameters, lr)``, and what each knows
of its weights beyond their 16 bits.

Betas are (0.9, 0.999), eps 1e-8, without weight decay. As in ``bench.peers``, libraries run themselves where
they run on a CPU; what does not is a formula in plain torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamw_triton_kernels import weights
from adamw_triton_kernels.work import REMAINDER
from bench.peers import FLASH_CODECS, Betas, Eager, FormulaAdamW, Stepper

BETAS, EPS = (0.9, 0.999), 1e-8
HOW = {"betas": BETAS, "eps": EPS, "weight_decay": 0.0}

Known = Callable[[Any, Tensor], Tensor]
"""(optimizer, parameter) -> fp32, the weight with all that is kept of it."""


@dataclass(frozen=True)
class Way:
    """One curve."""

    label: str
    build: Callable[[list[Tensor], float], Stepper]
    known: Known = lambda optimizer, p: p.float()
    ours: bool = False


class Float32Weights:
    """fp32 weights; the parameters are their rounding, as exact ones are rounded: to nearest, ties up in the
    bits. So forward and backward are in bf16 as in every other way."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        self.pairs = [(p, p.detach().float().requires_grad_()) for p in parameters]
        self.optimizer = _ours()([weight for _, weight in self.pairs], lr)
        self.state = {p: {"weight": weight} for p, weight in self.pairs}

    @torch.no_grad()
    def step(self) -> None:
        for p, weight in self.pairs:
            weight.grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()
        for p, weight in self.pairs:
            weights.write(weight, p, [torch.empty_like(p, dtype=torch.int16)], REMAINDER)


class CorrectedAdamW(FormulaAdamW):
    """flashoptim 0.1.4 with ``master_weight_bits=24``, _triton_adam_kernel: 8-bit state, and beside a bf16
    weight an int8, the error of rounding in 127ths of half a unit of the weight's last place."""

    def __init__(self, parameters: list[Tensor], lr: float, betas: Betas, eps: float) -> None:
        super().__init__(parameters, lr, betas, eps, FLASH_CODECS, min_size=0)
        self.errors = {p: torch.zeros_like(p, dtype=torch.int8) for p in parameters}

    def add(self, p: Tensor, change: Tensor) -> None:
        weight = self.weight(p) + change
        p.copy_(weight)
        error = (weight - p.float()) / _half_unit(p)
        scaled = 127.0 * error.clamp(-1.0, 1.0)
        self.errors[p] = torch.copysign((scaled.abs() + 0.5).floor(), scaled).to(torch.int8)

    def weight(self, p: Tensor) -> Tensor:
        return p.float() + self.errors[p].float() / 127.0 * _half_unit(p)


def _half_unit(p: Tensor) -> Tensor:
    """Of the last place of bf16 numbers."""
    exponent = (p.view(torch.int16).int() >> 7 & 0xFF).clamp(min=1) - 127
    return torch.exp2((exponent - 8).float())


def _ours(**options: Any) -> Callable[[list[Tensor], float], Stepper]:
    def build(parameters: list[Tensor], lr: float) -> Stepper:
        from adamw_triton import AdamW

        return AdamW(parameters, lr=lr, **HOW, **{"variant": "32bit", **options})

    return build


def _torch(parameters: list[Tensor], lr: float) -> Stepper:
    return torch.optim.AdamW(parameters, lr=lr, **HOW)


def _kahan(parameters: list[Tensor], lr: float) -> Stepper:
    from optimi import AdamW

    return AdamW(parameters, lr=lr, **HOW)


def _torchao(parameters: list[Tensor], lr: float) -> Stepper:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # of each CUDA extension that is not there
    from torchao.optim import AdamW8bit

    return Eager(AdamW8bit(parameters, lr=torch.tensor(lr), bf16_stochastic_round=True, **HOW))


def _exact(optimizer: Any, p: Tensor) -> Tensor:
    return weights.read(p, [optimizer.state[p][REMAINDER].view_as(p)], REMAINDER)


def _compensated(optimizer: Any, p: Tensor) -> Tensor:
    return p.float() + optimizer.state[p]["kahan_comp"].float()


FLOAT32 = "fp32 weights"
NEAREST, STOCHASTIC, EXACT, EXACT8 = (
    f"adamw_triton bf16, {how}" for how in ("nearest", "stochastic", "exact", "exact, 8-bit state")
)

WAYS = (
    Way(FLOAT32, Float32Weights, lambda optimizer, p: optimizer.state[p]["weight"].detach(), ours=True),
    Way(EXACT, _ours(master_weights=True), _exact, ours=True),
    Way(EXACT8, _ours(master_weights=True, variant="8bit"), _exact, ours=True),
    Way(STOCHASTIC, _ours(stochastic_rounding=True), ours=True),
    Way(NEAREST, _ours(), ours=True),
    Way("torch bf16, nearest, bf16 state", _torch),
    Way("torch-optimi, Kahan, bf16 state", _kahan, _compensated),
    Way("torchao 8-bit, stochastic (eager)", _torchao),
    Way(
        "flashoptim 8-bit, 24-bit weights (formula)",
        lambda parameters, lr: CorrectedAdamW(parameters, lr, BETAS, EPS),
        lambda optimizer, p: optimizer.weight(p),
    ),
)
