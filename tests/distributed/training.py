"""What a rank does: train a tiny Llama, sharded or whole."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import adamw_triton

SIZES = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "attn_implementation": "eager",
}  # fmt: skip
"""Rows of whole blocks, so that every shard has whole blocks."""


def llama(dtype: torch.dtype = torch.float32, **sizes: Any) -> nn.Module:
    """The same one on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).to(dtype)


class Blocks(nn.Module):
    """Less to import than a Llama, and of the same parts."""

    def __init__(self, vocab_size: int = 256, hidden_size: int = 128, intermediate_size: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.embed = nn.Embedding(vocab_size, hidden_size)
        self.model.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden_size),
                nn.Linear(hidden_size, intermediate_size),
                nn.GELU(),
                nn.Linear(intermediate_size, hidden_size),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.model.layers:
            x = x + layer(x)
        logits = self.head(x[:, :-1]).flatten(0, 1).float()
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))


def sharded(model: nn.Module, mesh: tuple[int, ...] | None = None) -> nn.Module:
    """By FSDP2, layer by layer; of two dimensions of the mesh, the first has replicas."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicas", "shards")
    how = {} if mesh is None else {"mesh": init_device_mesh("cpu", mesh, mesh_dim_names=names)}
    for layer in model.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    return model


def by_tensors(model: nn.Module) -> nn.Module:
    """Tensor parallel: rows of some matrices, columns of others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        parallelize_module(layer.mlp, mesh, plan)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "whole": lambda model: model,
    "shards": sharded,
    "replicas of shards": lambda model: sharded(model, (2, dist.get_world_size() // 2)),
    "tensors": by_tensors,
}


def batch(step: int) -> Tensor:
    """The same one on all ranks: gradients are averaged to the bits of one process, for ranks are 2 or 4."""
    return torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    accumulation: int = 1,
    scale: float = 1.0,
) -> list[float]:
    """The losses."""
    losses = []
    for step in steps:
        for part in range(accumulation):
            given = batch(accumulation * step + part)
            loss = model(input_ids=given, labels=given).loss * (scale / accumulation)
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(param.detach()).clone() for name, param in model.named_parameters()}


class Case(NamedTuple):
    """One run."""

    arguments: dict[str, Any]
    dtype: torch.dtype = torch.float32
    sizes: dict[str, Any] | None = None
    accumulation: int = 1
    scale: float = 1.0
    """Of the loss: fp16 loses small gradients when ranks average them."""
    optimizer: Callable[..., Any] = adamw_triton.AdamW


class Run(NamedTuple):
    """What became of it."""

    losses: list[float]
    weights: dict[str, Tensor]
    norm: float | None
    """Of the last gradients."""


def trained(case: Case, way: str, steps: int) -> Run:
    model = WAYS[way](llama(case.dtype, **case.sizes or {}))
    optimizer = case.optimizer(model.parameters(), lr=1e-3, **case.arguments)
    losses = train(model, optimizer, range(steps), case.accumulation, case.scale)
    norm = getattr(optimizer, "grad_norm", None)
    return Run(losses, weights(model), None if norm is None else float(norm))


def of_cases(cases: list[Case], way: str, steps: int) -> list[Run]:
    """One after the other in the same processes."""
    found = [trained(case, way, steps) for case in cases]
    return found if dist.get_rank() == 0 else []
