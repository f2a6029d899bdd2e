"""What a step's statistics have to be: ``Observed`` of any step, worked out in float64 from copies of all
tensors that were taken before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adamw_triton import AdamW
from adamw_triton.telemetry.observed import Observed, Told
from adamw_triton_kernels.codes import decode_8bit
from adamw_triton_kernels.statistics import COLUMN, SAMPLED, WIDTH
from adamw_triton_kernels.work import NEAREST, SKIP, Hyper

KEPT = ("remainder", "master")


class Watched:
    """Steps an optimizer of named parameters, without amsgrad and loss scales.

    Args:
        stochastic: whether its bf16 weights are rounded so.
    """

    def __init__(self, optimizer: AdamW, stochastic: bool = False) -> None:
        self.optimizer = optimizer
        self._stochastic = stochastic
        self._steps = 0

    def step(self) -> Observed:
        skipped = self.optimizer.skipped_steps
        before = [
            (name, param, group, self._seen(param))
            for group in self.optimizer.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        ]
        self.optimizer.step()
        self._steps += 1
        factor = self._factor(skipped)
        found = [
            (self._told(name, param, group), *self._row(param, group, seen, factor))
            for name, param, group, seen in before
            if param.grad is not None and param.numel()
        ]
        idle = tuple(name for name, param, *_ in before if param.grad is None)
        told, rows, hypers = zip(*found, strict=True) if found else ((), (), ())
        sums = torch.stack(rows) if found else torch.zeros(0, WIDTH, dtype=torch.float64)
        return Observed(self._steps, told, sums, torch.tensor(hypers, dtype=torch.float64), idle)

    def _factor(self, skipped: int) -> float:
        if self.optimizer.skipped_steps > skipped:
            return SKIP
        if self.optimizer.max_grad_norm is None or self.optimizer.grad_norm is None:
            return 1.0
        factor = self.optimizer.max_grad_norm / (float(self.optimizer.grad_norm) + 1e-6)
        return 1.0 if factor > 1 else factor

    def _seen(self, param: Tensor) -> dict[str, Any]:
        """Copies of what the step reads, and of what it writes."""
        state = {name: torch.as_tensor(value).clone() for name, value in self.optimizer.state[param].items()}
        weight = param.detach().clone()
        return {"weight": weight, "exact": self._exact(param), "moments": _moments(state, weight), **state}

    def _exact(self, param: Tensor) -> Tensor:
        kept = set(KEPT) & set(self.optimizer.state[param])
        return (self.optimizer.master_weight(param) if kept else param.detach()).double().clone()

    def _told(self, name: str, param: Tensor, group: dict[str, Any]) -> Told:
        state = self.optimizer.state[param]
        kept = next((each for each in KEPT if each in state), NEAREST)
        weights = "stochastic" if self._stochastic and param.dtype is torch.bfloat16 else kept
        bits = 8 if "exp_avg_codes" in state else 32
        rates = float(group["lr"]), float(group["weight_decay"])
        return Told(name, param.numel(), param.dtype, weights, bits, *rates, param.dim())

    def _row(
        self, param: Tensor, group: dict[str, Any], seen: dict[str, Any], factor: float
    ) -> tuple[Tensor, list[float]]:
        assert param.grad is not None
        state = self.optimizer.state[param]
        hyper = Hyper.at(
            max(int(state["step"]), 1),  # a first step that is skipped has not been counted
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=-1.0 if group["maximize"] else 1.0,
        )
        row = torch.zeros(WIDTH, dtype=torch.float64)
        given, weight = param.grad.double().flatten(), seen["exact"].flatten()
        row[COLUMN["factor"]] = factor
        row[COLUMN["nan"]], row[COLUMN["inf"]] = given.isnan().sum(), given.isinf().sum()
        gradient = given * hyper.grad_scale * factor
        row[COLUMN["gradient"]] = given.square().sum()
        if factor == SKIP:
            return row, list(hyper[:-1])
        beta1, beta2 = group["betas"]
        old_m, old_v = seen["moments"]
        m, v = beta1 * old_m + (1 - beta1) * gradient, beta2 * old_v + (1 - beta2) * gradient.square()
        change = m / (v.sqrt() * hyper.inv_root_correction2 + hyper.eps) + hyper.decay * weight
        squares = {"weight": weight, "change": change, "exp_avg": m}
        for column, values in squares.items():
            row[COLUMN[column]] = values.square().sum()
        stayed = self._exact(param).flatten() == weight
        row[COLUMN["exp_avg_sq"]], row[COLUMN["exp_avg_sq_max"]] = v.sum(), torch.where(v == v, v, 0.0).max()
        row[COLUMN["lost"]] = (stayed & (change * hyper.step_size != 0)).sum()
        if "exp_avg_codes" in state:
            codes = state["exp_avg_sq_codes"].flatten()
            old = seen.get("exp_avg_sq_codes", torch.zeros_like(codes)).flatten()
            looked = torch.arange(codes.numel()) % SAMPLED == 0
            flags = {
                "top": codes == 255,
                "bottom": codes == 1,
                "stalled": (codes == old) & (v != old_v),
                "zero": state["exp_avg_codes"].flatten() == 0,
            }
            for column, flag in flags.items():
                row[COLUMN[column]] = (flag & looked).sum()
        return row, list(hyper[:-1])


def _moments(state: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """m and v, as the step finds them."""
    if "exp_avg_codes" in state:
        flat = {name: each.flatten() for name, each in state.items() if name.startswith("exp_avg")}
        block = flat["exp_avg_codes"].numel() // flat["exp_avg_scales"].numel()
        m, v = decode_8bit(flat, -(-block // 128) * 128)
        return m.double(), v.double()
    if "exp_avg" in state:
        return state["exp_avg"].double().flatten(), state["exp_avg_sq"].double().flatten()
    nothing = torch.zeros(weight.numel(), dtype=torch.float64)
    return nothing, nothing
