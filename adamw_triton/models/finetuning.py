"""What a fine-tuning run puts on the GPU for a model's weights: tensors of its shapes, without memory.

All weights are trained, or LoRA adapters beside frozen ones, which may be quantized to 4 bits (QLoRA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton.models import ModelFileError, Weight
from adamw_triton.models.activations import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What can be trained, by the names that people type."""

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FLOATING = re.compile(r"B?F\d")
_COUNTED = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}

NF4_BLOCK = 64
"""Weights that share one fp32 scale in bitsandbytes' NF4."""

# PEFT's targets="all-linear", too, leaves out what embeds tokens and what scores them.
_NOT_LINEAR = re.compile(
    r"(^|\.)(lm_head|embed_out|output|score|shared|wte|wpe|\w*embed\w*)\.weight$", re.IGNORECASE
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|score)\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)

TARGETS = ("attention", "all-linear")


class Run(NamedTuple):
    """How a model is trained."""

    dtype: torch.dtype | None = None
    """Of the weights; None: as they are stored."""
    rank: int | None = None
    """Of LoRA adapters; None: all weights are trained."""
    targets: str = "attention"
    """Which projections have adapters: those of the attention, or all."""
    quantized: bool = False
    """The frozen projections are held in 4 bits."""


def tensors(weights: Sequence[Weight], run: Run) -> list[Tensor]:
    """On the meta device; those that are trained require gradients.

    LoRA gives a projection of shape [m, n] two adapters, [rank, n] and [m, rank]. They are fp32, as
    PEFT keeps them whatever the model's dtype. A stack of experts has the rank once for each, and twice where
    it makes gate and up.

    Raises:
        ModelFileError: nothing can be trained so.
    """
    found = [tensor for weight in weights for tensor in _held(weight, run)]
    if run.rank is not None:
        for weight in adapted(weights, run):
            *experts, rows, columns = weight.shape
            rank = run.rank * math.prod(experts) * (1 + (is_stack(weight) and "gate_up" in weight.name))
            found += [_meta((rank, columns), torch.float32), _meta((rows, rank), torch.float32)]
    elif not any(tensor.requires_grad for tensor in found):
        raise ModelFileError("the model has no floating point weights: nothing can be trained")
    return found


def adapted(weights: Sequence[Weight], run: Run) -> list[Weight]:
    """The projections that LoRA adapts; none without it.

    Raises:
        ModelFileError: there are none, or they are quantized already.
    """
    if run.rank is None:
        return []
    found = [
        weight
        for weight in weights
        if (is_linear(weight) and (run.targets == "all-linear" or _ATTENTION.search(weight.name)))
        or (is_stack(weight) and run.targets == "all-linear")
    ]
    if not found:
        raise ModelFileError(f"the model has no projections that --lora-targets {run.targets} means")
    stored = next((weight for weight in found if not _FLOATING.match(weight.dtype)), None)
    if stored is not None:
        raise ModelFileError(
            f"{stored.name!r} is stored quantized, as {stored.dtype}: name the original model, "
            "and --quantized-base 4"
        )
    return found


def dtype_of(weights: Sequence[Weight], run: Run) -> torch.dtype:
    """Of the model as it computes: the one that is asked for, or that most of its weights are stored in."""
    if run.dtype is not None:
        return run.dtype
    sizes = dict.fromkeys(_STORED, 0)
    for weight in weights:
        if weight.dtype in sizes:
            sizes[weight.dtype] += weight.numel
    return _STORED[max(sizes, key=lambda name: sizes[name])]


def workload(weights: Sequence[Weight], run: Run, visited: int = 1) -> Workload:
    """What the estimate of activations has to know; ``visited``: experts of a layer that a token visits."""
    dtype = dtype_of(weights, run)
    floating = [weight for weight in weights if _FLOATING.match(weight.dtype)]
    return Workload(
        itemsize=dtype.itemsize,
        gradients=0 if run.rank is not None else sum(w.numel for w in floating if w.trained) * dtype.itemsize,
        tied=not any(_HEAD.search(weight.name) for weight in weights),
        adapted_inputs=sum(_inputs(adapted(weights, run), visited).values()),
        largest_quantized=run.quantized * max(weight.numel * is_linear(weight) for weight in weights),
    )


def is_linear(weight: Weight) -> bool:
    """Whether it is the matrix of a projection inside the model: by name and shape, unless it is known."""
    named = len(weight.shape) == 2 and weight.name.endswith(".weight") and not _NOT_LINEAR.search(weight.name)
    return named and weight.linear


def is_stack(weight: Weight) -> bool:
    """Whether it is one projection of all experts of a layer, as transformers has them since version 5."""
    return len(weight.shape) == 3 and ".experts." in weight.name


def _inputs(projections: Sequence[Weight], visited: int) -> dict[str, int]:
    """Numbers of one token that go into each; experts of a layer are alike."""
    found = {}
    for weight in projections:
        name, several = _EXPERT.subn(".experts.", weight.name)
        found[name] = weight.shape[-1] * (visited if several or is_stack(weight) else 1)
    return found


def nf4_bytes(numel: int) -> int:
    """Of a quantized projection: half a byte a weight, and fp32 for every 64 of them; 0.5625 in all."""
    return -(-numel // 2) + 4 * -(-numel // NF4_BLOCK)


def _held(weight: Weight, run: Run) -> Iterator[Tensor]:
    if run.quantized and is_linear(weight):
        yield _meta((nf4_bytes(weight.numel),), torch.uint8, trained=False)
    elif not _FLOATING.match(weight.dtype):
        yield _meta(weight.shape, _COUNTED[_bits(weight)], trained=False)
    else:
        dtype = run.dtype or _STORED.get(weight.dtype)
        if dtype is None:
            raise ModelFileError(f"{weight.name!r} is stored as {weight.dtype}: give the --dtype to train in")
        yield _meta(weight.shape, dtype, trained=run.rank is None and weight.trained)


def _bits(weight: Weight) -> int:
    found = re.search(r"\d+", weight.dtype)
    return int(found[0]) if found else 8  # BOOL


def _meta(shape: tuple[int, ...], dtype: torch.dtype, *, trained: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)
