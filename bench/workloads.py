"""What is stepped on: sets of parameter shapes, and a real Llama architecture with text to train it on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shapes = list[tuple[int, ...]]


def one(numel: int) -> Shapes:
    """A single tensor."""
    return [(numel,)]


def llama(width: int, depth: int, vocab: int) -> Shapes:
    """A Llama's parameters: per layer four square matrices, three of the MLP, two norms."""
    inner = width * 11 // 4
    layer: Shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)] + [(width,)] * 2
    return [(vocab, width), *(layer * depth), (width,), (vocab, width)]


def lora(count: int = 300, width: int = 2048, rank: int = 16) -> Shapes:
    """Adapters: pairs of small matrices."""
    return [(rank, width), (width, rank)] * (count // 2)


def numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def tensors(shapes: Shapes, dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """Parameters with gradients, normal; the gradients of 1e-3."""
    torch.manual_seed(seed)
    params = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param).mul_(1e-3)
    return params


# --- A model that trains -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llama:
    """A ``transformers.LlamaForCausalLM`` over bytes, and how it is fed."""

    width: int
    depth: int
    batch: int
    context: int
    dtype: torch.dtype = torch.float32

    def model(self, device: str, seed: int) -> nn.Module:
        """The same weights for the same seed."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=256, hidden_size=self.width, intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.depth, num_attention_heads=max(1, self.width // 64),
            max_position_embeddings=self.context, use_cache=False,
        )  # fmt: skip
        with torch.device(device):  # a CPU draws a billion weights in ten seconds
            made: nn.Module = LlamaForCausalLM(config).to(self.dtype)
        return made

    def batches(self, device: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless windows of the sources of Python's standard library, and what follows each byte."""
        from adamw_triton.demo.corpus import Batches, load_corpus

        return Batches(load_corpus(), self.batch, self.context, seed, device)

    @staticmethod
    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy in nats a byte."""
        inputs, targets = batch
        logits = model(input_ids=inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
