"""What a page's blocks find there: a small model, sequences, and folders by the names of models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import adamw_triton
from bench.suites.limit import LLAMA_3B, LLAMA_8B

CONFIGS = {"Llama-3.2-3B": LLAMA_3B, "Llama-3.1-8B": LLAMA_8B}
OWNER = "meta-llama"
NAMES = ("model", "batches", "dataset", "device", "adamw_triton", "torch")


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).bfloat16()


def sequences() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in (torch.arange(16) + torch.arange(16)[:, None]) % 128]


def names() -> dict[str, Any]:
    dataset = sequences()
    batches = [{key: value[None] for key, value in row.items()} for row in dataset[:12]]
    values = (llama(), batches, dataset, "cpu", adamw_triton, torch)
    return dict(zip(NAMES, values, strict=True))


def folders(root: Path) -> None:
    """``./Llama-3.1-8B`` is a config.json of its shape, ``./meta-llama/Llama-3.1-8B`` a tiny model."""
    for name, config in CONFIGS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        llama().save_pretrained(root / OWNER / name)


class Sharded(nn.Module):
    """Has ``layers`` to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers[1](self.layers[0](hidden))
        return out


@contextmanager
def one_rank() -> Iterator[dict[str, Any]]:
    """tests/distributed has more."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield {"model": Sharded()}
    finally:
        dist.destroy_process_group()


@contextmanager
def stepped() -> Iterator[dict[str, Any]]:
    """An optimizer that has state."""
    found = names()
    optimizer = adamw_triton.AdamW(found["model"].parameters(), variant="8bit")
    found["model"](**found["batches"][0]).loss.backward()
    optimizer.step()
    yield {**found, "optimizer": optimizer}


PREPARED = {"docs/guides/fsdp2.md": one_rank, "docs/guides/checkpoints.md": stepped}
"""Pages that take more for granted."""
