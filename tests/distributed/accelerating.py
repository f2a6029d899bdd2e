"""accelerate with FSDP2 on CPUs, in a rank."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

import adamw_triton
from tests.distributed.training import llama

LAYER = "LlamaDecoderLayer"


def pretend() -> None:
    """accelerate shards on GPUs and their kind alone, and on CPUs says nothing and takes DDP: so it is told
    that these are GPUs. The group of processes is there already; only their device matters further on."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    found: Any = PartialState
    found._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    gc.freeze()  # accelerate collects garbage often, each time through all that was imported


def anew() -> None:
    """accelerate's state is of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(
    arguments: dict[str, Any], dtype: torch.dtype, plugin: dict[str, Any] | None, precision: str
) -> tuple[Accelerator, Any, Any]:
    """Accelerator, model and optimizer. Without ``plugin`` the environment says how to shard."""
    anew()
    made = None
    if plugin is not None:
        made = FullyShardedDataParallelPlugin(
            fsdp_version=2, transformer_cls_names_to_wrap=[LAYER], auto_wrap_policy="transformer_based_wrap",
            **plugin,
        )  # fmt: skip
    accelerator = Accelerator(fsdp_plugin=made, mixed_precision=precision)
    model = llama(dtype)
    optimizer = adamw_triton.AdamW(model.parameters(), lr=1e-3, **arguments)
    return accelerator, *accelerator.prepare(model, optimizer)
