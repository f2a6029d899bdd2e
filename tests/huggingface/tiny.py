"""A Llama small enough for a test, its data, and what a training run leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import adamw_triton.huggingface

VARIANTS = adamw_triton.huggingface.OPTIMIZERS
"""The variant of each string."""
VOCABULARY = 128


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Its matrices have over 4,096 elements, which 8-bit state takes; its norms do not."""
    transformers.set_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **changes)).to(dtype)


def tokens(count: int = 64, length: int = 16) -> list[dict[str, Any]]:
    """Sequences that count upwards from random starts: learnt in a few steps."""
    starts = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(0))
    rows = (starts + torch.arange(length)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, optim: str, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": optim,
    }
    return TrainingArguments(**{**settings, **changes})


def trainer(args: TrainingArguments, model: Any, **extra: Any) -> Trainer:
    return Trainer(model=model, args=args, train_dataset=tokens(), **extra)


def optimizer_of(trained: Trainer) -> Any:
    """Ours, out of accelerate's wrapper."""
    return trained.optimizer.optimizer


def is_paged(optimizer: Any) -> bool:
    """Whether all state is where paged state lives; it has to be all or none."""
    (paged,) = {buffer.paged for buffer in optimizer._store.buffers}
    return bool(paged)


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in model.state_dict().items()}


def state_bits(optimizer: torch.optim.Optimizer) -> list[tuple[Any, str, str, bytes]]:
    """Of every tensor: its parameter's number, its name, dtype and bits."""
    return [
        (index, name, str(value.dtype), raw(value))
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    ]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
