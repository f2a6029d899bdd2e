"""The real optimizers whose state we load, and what each one's state means in fp32, by its own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from tests.checkpoint import release_0
from tests.optimizer.problems import parameters, train

SHAPES = ((70, 70), (64, 128), (5000,), (3,), (1,))
"""5,000 and 4,900 are no multiples of a block."""
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.85, 0.98), "eps": 1e-7, "weight_decay": 0.03}
Moments = list[tuple[Tensor, Tensor]]


def ours(variant: str, block_size: int = 128) -> Callable[[list[Parameter]], torch.optim.Optimizer]:
    return lambda params: AdamW(params, **HYPER, variant=variant, block_size=block_size)


def bitsandbytes(name: str) -> Callable[[list[Parameter]], torch.optim.Optimizer]:
    def make(params: list[Parameter]) -> torch.optim.Optimizer:
        module = pytest.importorskip("bitsandbytes")
        optimizer: torch.optim.Optimizer = getattr(module.optim, name)(params, **HYPER)
        return optimizer

    return make


def torchao(params: list[Parameter]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = pytest.importorskip("torchao.optim").AdamW8bit(params, **HYPER)
    return optimizer


SOURCES: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
    "ours 32bit": ours("32bit"),
    "ours 8bit": ours("8bit"),
    "ours 8bit, blocks of 256": ours("8bit", 256),
    "ours paged_32bit": ours("paged_32bit"),
    "ours paged_8bit": ours("paged_8bit"),
    "torch AdamW": lambda params: torch.optim.AdamW(params, **HYPER),
    "torch Adam": lambda params: torch.optim.Adam(params, **{**HYPER, "weight_decay": 0}),
    "bitsandbytes 32-bit": bitsandbytes("AdamW32bit"),
    "bitsandbytes 8-bit": bitsandbytes("AdamW8bit"),
    "torchao 8-bit": torchao,
}


def trained(
    name: str, steps: int = 20, dtype: torch.dtype = torch.float32
) -> tuple[list[Parameter], torch.optim.Optimizer]:
    params = parameters(SHAPES, dtype)
    optimizer = SOURCES[name](params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)  # torchao: minutes, same arithmetic
        train(optimizer, steps)
    return params, optimizer


def meaning(optimizer: torch.optim.Optimizer) -> Moments:
    """m and v of each parameter in fp32, by the source's own decoder."""
    return [_meaning(entry) for entry in optimizer.state.values()]


def _meaning(entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if "absmax1" in entry:
        functional = pytest.importorskip("bitsandbytes.functional")
        m, v = (
            functional.dequantize_blockwise(
                entry[f"state{i}"], absmax=entry[f"absmax{i}"], code=entry[f"qmap{i}"], blocksize=256
            )
            for i in (1, 2)
        )
        return m, v
    if "state1" in entry:
        return entry["state1"], entry["state2"]
    if "exp_avg_codes" in entry:
        return release_0.decode(entry)
    m, v = (entry[key] for key in ("exp_avg", "exp_avg_sq"))
    if hasattr(m, "dequantize") and hasattr(m, "codes"):
        m, v = m.dequantize(), v.dequantize()
    return m.float(), v.float()
