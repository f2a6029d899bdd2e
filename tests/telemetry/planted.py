"""Histories of a model that never was, in which something is planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adamw_triton.telemetry.observed import Observed, Told
from adamw_triton_kernels.statistics import COLUMN, SAMPLED, WIDTH
from adamw_triton_kernels.work import SKIP

NAMES = (
    "token.weight",
    *(f"blocks.{layer}.{part}.weight" for layer in range(4) for part in ("norm", "attention", "mlp")),
    "head.weight",
)
USUAL: dict[str, Any] = {
    "numel": 4096,
    "dtype": torch.float32,
    "weights": "nearest",
    "bits": 32,
    "lr": 1e-3,
    "weight_decay": 0.1,
    "dims": 2,
    "grad_norm": 1.0,
    "weight_norm": 10.0,
    "update_norm": 0.01,
    "exp_avg_sq_mean": 1e-6,
    "eps": 1e-8,
    "factor": 1.0,
}
"""Of a tensor at a step. Shares and counts that are not named are 0; a weight's norm grows a little."""
IDLE = None
"""No gradient."""

Plant = Callable[[int, str], "dict[str, Any] | None"]
"""By step and name, what is unlike ``USUAL``."""


def history(steps: int, plant: Plant = lambda step, name: {}) -> list[Observed]:
    return [_observed(step, plant) for step in range(1, steps + 1)]


def _observed(step: int, plant: Plant) -> Observed:
    unlike = {name: plant(step, name) for name in NAMES}
    found = {name: {**_usual(step, name), **each} for name, each in unlike.items() if each is not IDLE}
    told = tuple(
        Told(name, *(numbers[field] for field in Told._fields[1:])) for name, numbers in found.items()
    )
    sums, hyper = zip(*map(_row, found.values()), strict=True) if found else ((), ())
    return Observed(
        step,
        told,
        torch.tensor(sums, dtype=torch.float64).view(-1, WIDTH),
        torch.tensor(hyper, dtype=torch.float64).view(-1, 7),
        tuple(name for name in NAMES if name not in found),
    )


def _usual(step: int, name: str) -> dict[str, Any]:
    norm = {"numel": 32} if "norm" in name else {}
    return {**USUAL, "weight_norm": USUAL["weight_norm"] + step * 1e-3, **norm}


def _row(numbers: dict[str, Any]) -> tuple[list[float], list[float]]:
    row = [0.0] * WIDTH
    step_size = numbers.get("step_size", numbers["lr"])
    columns = {
        "gradient": numbers["grad_norm"] ** 2,
        "weight": numbers["weight_norm"] ** 2,
        "change": (numbers["update_norm"] / step_size) ** 2 if step_size else 0.0,
        "exp_avg_sq": numbers["exp_avg_sq_mean"] * numbers["numel"],
        "lost": numbers.get("lost_share", 0.0) * numbers["numel"],
        "nan": numbers.get("nan_count", 0),
        "inf": numbers.get("inf_count", 0),
        "factor": numbers["factor"],
        "bottom": numbers.get("bottom_share", 0.0) * numbers["numel"] / SAMPLED,
    }
    for column, value in columns.items():
        row[COLUMN[column]] = value
    return row, [1.0, 0.1, 0.001, 1.0, numbers["eps"], step_size, numbers["weight_decay"]]


SKIPPED = {"factor": SKIP, "nan_count": 1}
