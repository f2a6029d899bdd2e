"""Weights that are stored as packed codes: which format it is, told by config.json or by tensors' names.

Codes are not numbers: neither their count nor their shapes are the model's. Nobody trains them, only LoRA's
adapters beside them (QLoRA); so such a model is read as what it was quantized from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adamw_triton.models.weights import Weight

BNB_4BIT, BNB_8BIT = "bitsandbytes' 4 bits", "bitsandbytes' 8 bits"

_TENSORS = {
    r"\.quant_state\.bitsandbytes__\w+$|\.weight\.(nested_)?absmax$": BNB_4BIT,
    r"\.SCB$": BNB_8BIT,
    r"\.qweight$": "GPTQ or AWQ",
    r"\.weight_packed$": "compressed-tensors",
    r"\.W_q$": "HQQ",
    r"_proj_blocks$": "MXFP4",
    r"\.weight_scale(_inv|_2|s)?$": "codes with scales (FP8, INT8, NVFP4)",
    r"\.weight\._(data|scale|packed)$|\.weight:_\w+$": "quanto or torchao",
    r"\.(codebooks|Qidxs\w*|SU|SV)$": "codebooks (AQLM, QuIP#)",
}
"""What only such files have: the end of a tensor's name."""
_ANY = re.compile("|".join(_TENSORS))

_CODES = re.compile(r"[UI](8|16|32)|F4|F6_\w+")
_FEW = 4096
"""Elements; buffers of whole numbers (positions, indices) may have as many."""


_KEYS = ("quantization_config", "compression_config", "quantization")
"""MLX writes the last."""


class Quantized(NamedTuple):
    """A model whose weights are packed."""

    format: str

    @property
    def is_4bit_base(self) -> bool:
        """Whether it is held as the plan counts a base in 4 bits."""
        return self.format == BNB_4BIT


def find(config: Mapping[str, Any], stored: Sequence[Weight]) -> Quantized | None:
    """How the weights are packed; None where they are numbers. ``stored``: without buffers."""
    for weight in stored:
        if _ANY.search(weight.name):
            return Quantized(next(kind for name, kind in _TENSORS.items() if re.search(name, weight.name)))
    for described in _descriptions(config):
        return Quantized(_format(described))
    for weight in stored:
        if _CODES.fullmatch(weight.dtype) and len(weight.shape) > 1 and weight.numel > _FEW:
            return Quantized(f"an unknown format ({weight.name!r} is {weight.dtype})")
    return None


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of what the model was quantized from."""
    return {
        key: {name: inner for name, inner in value.items() if name not in _KEYS}
        if isinstance(value, Mapping)
        else value
        for key, value in config.items()
        if key not in _KEYS
    }


def _descriptions(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Of the whole model, or of a part of it."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _KEYS:
            found = part.get(key)
            if found is not None:
                yield found if isinstance(found, Mapping) else {}


def _format(described: Mapping[str, Any]) -> str:
    method = described.get("quant_method")
    if method == "bitsandbytes" or (method is None and "load_in_4bit" in described):
        return BNB_8BIT if described.get("load_in_8bit") is True else BNB_4BIT
    bits = described.get("bits")
    name = f"{method:.40}" if isinstance(method, str) else "a format without a name"
    return f"{name}, {bits} bits" if type(bits) is int else name
