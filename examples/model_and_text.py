"""What the examples here train: a model that you name, or without one a tiny Llama of random weights, on
Python's own standard library."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adamw_triton.demo.corpus import load_corpus

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BYTES = 256
TINY = LlamaConfig(
    vocab_size=BYTES, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
)


def load(name: str | None, **how: Any) -> Any:
    """In bf16, on the GPU if there is one."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map=DEVICE, **how)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(TINY).to(torch.bfloat16).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE, **how)


def batches(name: str | None, rows: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Without end. The tiny model reads bytes, others what their tokenizers make of the text."""
    text = load_corpus(max_bytes=1 << 20)
    if name is None:
        tokens = text.long()
    else:
        words = bytes(text.tolist()).decode("utf-8", "replace")
        tokens = torch.tensor(AutoTokenizer.from_pretrained(name)(words)["input_ids"])
    where = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(tokens) - length, (rows,), generator=where)
        batch = torch.stack([tokens[at : at + length] for at in starts]).to(DEVICE)
        yield {"input_ids": batch, "labels": batch}
