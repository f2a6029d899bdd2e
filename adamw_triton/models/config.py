"""What a model's config.json says about its size, under whichever names its family uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from adamw_triton.models.weights import ModelFileError

LIMITS = {
    "hidden_size": 1 << 20,
    "num_hidden_layers": 10_000,
    "vocab_size": 1 << 26,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "moe_intermediate_size": 1 << 24,
    "num_experts_per_tok": 1 << 12,
    "num_experts": 1 << 12,
    "num_local_experts": 1 << 12,
    "num_labels": 1 << 20,
}
"""The largest value that is believed: ten or more times that of any model so far."""

_OTHER_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
_LIMITS = LIMITS | {other: LIMITS[name] for name, other in _OTHER_NAMES.items()}
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""That a model is most of all told by; never zero."""
_LAYERS = re.compile(r"layers$|^depths?$")

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Dimensions(NamedTuple):
    """What the activations of a decoder depend on."""

    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    """Width of the feed-forward, of all experts that a token goes through."""
    query_width: int
    """Heads times width of a head."""
    key_width: int
    """The same of the keys, which fewer heads may share."""
    visited: int = 1
    """Experts of a layer that a token goes through."""


def size(config: Mapping[str, Any], key: str) -> int | None:
    """A whole number that is at least 1; None where the file says nothing, or null.

    Raises:
        ModelFileError: it is something else, or absurd.
    """
    value = config.get(key)
    if value is None and key in _OTHER_NAMES:
        value = config.get(_OTHER_NAMES[key])
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= LIMITS[key]:
        raise _absurd(key, value, LIMITS[key])
    return value


def language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the language model: of a multimodal model it is an object of its own."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def read_dtype(config: Mapping[str, Any]) -> str | None:
    """Of the weights on disk, as safetensors writes it; None where it is not said."""
    value = config.get("dtype", config.get("torch_dtype"))
    return _DTYPES.get(value) if isinstance(value, str) else None


def check_sizes(config: Mapping[str, Any]) -> bool:
    """Whether the config or a part of it says any; else a library takes its own defaults for all of them.

    Raises:
        ModelFileError: one is absurd. Others would build that model, for hours.
    """
    found = False
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key, value in part.items():
            limit = LIMITS["num_hidden_layers"] if _LAYERS.search(key) else _LIMITS.get(key)
            counts = value if isinstance(value, list) else [value]  # of vision's stages, one each
            if limit is None or not counts or not all(type(count) is int for count in counts):
                continue
            if not all((key in SIZES) <= count <= limit for count in counts):
                raise _absurd(key, value, limit)
            found = True
    return found


def read_dimensions(config: Mapping[str, Any]) -> tuple[Dimensions | None, str]:
    """None where the file leaves out too much or tells of another kind of model; and what that is, or what
    of the model these dimensions leave out."""
    if config.get("is_encoder_decoder") is True:
        return None, "there is no estimate for an encoder with a decoder"
    inner = language_part(config)
    beside = sorted(key for key in config if key.endswith("_config") and key in _PARTS)
    try:
        found, missing = _dimensions(inner)
    except ModelFileError as error:
        return None, str(error)
    if missing:
        return (
            None,
            f"nothing tells {', '.join(missing)}" if config else "nothing tells the model's dimensions",
        )
    return found, f"without the part of its {' and its '.join(beside)}" if beside else ""


_PARTS = ("vision_config", "audio_config", "speech_config", "qformer_config")


def _dimensions(config: Mapping[str, Any]) -> tuple[Dimensions | None, list[str]]:
    """And what is missing for them."""
    needed = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    hidden, layers, vocabulary, heads = (size(config, key) for key in needed)
    if hidden is None or layers is None or vocabulary is None or heads is None:
        return None, [key for key in needed if size(config, key) is None]
    head_dim = size(config, "head_dim") or max(1, hidden // heads)
    visited = size(config, "num_experts_per_tok") or 1
    expert = size(config, "moe_intermediate_size") or size(config, "intermediate_size") or 4 * hidden
    return Dimensions(
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        intermediate=expert * visited,
        query_width=heads * head_dim,
        key_width=(size(config, "num_key_value_heads") or heads) * head_dim,
        visited=visited,
    ), []


def _absurd(key: str, value: object, limit: int) -> ModelFileError:
    shown = f"{value!r:.60}"
    return ModelFileError(f"config.json says {key}={shown}: it must be a whole number, 1 to {limit:,}")
