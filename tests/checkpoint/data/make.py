"""Writes the frozen checkpoints of this folder, once for each version of the format. Never run again for a
version that has been released: the point of the files is that they stay.

    python -m tests.checkpoint.data.make
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from tests.optimizer.problems import parameters, train

HERE = Path(__file__).parent
SHAPES = {
    "32bit": ((9, 8), (1,)),
    "amsgrad": ((9, 8), (1,)),
    "8bit": ((65, 64), (48,)),
    "8bit_256": ((65, 64), (48,)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "32bit": {},
    "8bit": {"variant": "8bit"},
    "8bit_256": {"variant": "8bit", "block_size": 256},
    "amsgrad": {"amsgrad": True},
}


def optimizer(name: str, params: list[Parameter]) -> AdamW:
    named = [(f"layer.{index}", param) for index, param in enumerate(params)]
    groups = [{"params": named[:1], "lr": 1e-2}, {"params": named[1:], "weight_decay": 0.0}]
    return AdamW(groups, **OPTIONS[name])


def main() -> None:
    for name in OPTIONS:
        params = parameters(SHAPES[name], torch.bfloat16)
        before = optimizer(name, params)
        checkpoint = {"params": train(before, 3), "optimizer": copy.deepcopy(before.state_dict())}
        torch.save(
            {**checkpoint, "two_steps_later": train(before, 2, first=4)}, HERE / f"version_1_{name}.pt"
        )


if __name__ == "__main__":
    main()
