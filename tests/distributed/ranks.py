"""Processes that train together on the CPU: each runs the same function, and says what it found."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 120
"""Seconds that a collective may take."""


IMPORTED = (
    "adamw_triton.selection.auto", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "torch.distributed.optim", "torch.distributed.tensor",
)  # fmt: skip


def context() -> Any:
    """Of processes that are forked from one that has imported all this: each would take seconds for it."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload([*IMPORTED])
    return found


def together(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns in each of so many processes of one gloo group, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        context()
        mp.start_processes(
            _one, (world, folder, function, arguments), nprocs=world, start_method="forkserver"
        )
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world)]


def _one(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    try:
        torch.save(function(*arguments), Path(folder, str(rank)))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
