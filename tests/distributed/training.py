"""What a rank does: train a tiny Llama, sharded or whole."""

from __future__ import annotations

from typing import Any

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


def sharded(model: nn.Module, **how: Any) -> nn.Module:
    """By FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    return model


def batch(step: int) -> Tensor:
    """The same one on all ranks: gradients are averaged to the bits of one process, for ranks are 2 or 4."""
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses."""
    losses = []
    for step in steps:
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(param.detach()).clone() for name, param in model.named_parameters()}


def trained(arguments: dict[str, Any], dtype: torch.dtype, steps: int, shard: bool) -> Any:
    """Losses and weights of a run."""
    model = llama(dtype)
    if shard:
        sharded(model)
    optimizer = adamw_triton.AdamW(model.parameters(), lr=1e-3, **arguments)
    losses = train(model, optimizer, range(steps))
    return losses, weights(model)


def of_cases(cases: list[tuple[dict[str, Any], torch.dtype, int]]) -> list[Any]:
    """Sharded, one after the other in the same processes."""
    found = [trained(arguments, dtype, steps, True) for arguments, dtype, steps in cases]
    return found if dist.get_rank() == 0 else []
