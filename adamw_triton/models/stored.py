"""What of a model's stored tensors is trained: no buffers, and tied weights once.

transformers leaves out tied weights and buffers when it saves; others do not, nor did it always. Where
the architecture cannot be asked, names and shapes tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adamw_triton.models.config import language_part
from adamw_triton.models.families import FAMILIES
from adamw_triton.models.weights import Weight

_FLOATING = re.compile(r"B?F\d")
_BUFFER = re.compile(
    r"(inv_freq|(cos|sin)_cached|running_(mean|var)|masked_bias|final_logits_bias|embed_scale|attn_mask|\w*_ids"
    r"|\w*position_index|causal_mask|num_batches_tracked)$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(shared|embed_tokens|wte|tok_embeddings|embed_in|(word_)?embeddings)\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|output|proj_out|predictions\.decoder|generator_lm_head|vocab_projector)"
    r"\.weight$"
)


def without_buffers(stored: Sequence[Weight]) -> list[Weight]:
    """Causal masks (``bias`` of four dimensions), frequencies and statistics are no parameters."""
    return [
        weight
        for weight in stored
        if not _BUFFER.search(weight.name) and not (weight.name.endswith("bias") and len(weight.shape) == 4)
    ]


def parameters(stored: Sequence[Weight], config: Mapping[str, Any]) -> list[Weight]:
    """Those of ``without_buffers``, each once. Whole numbers are none; ``config`` may be empty."""
    tied = _is_tied(config)
    shared = any(re.search(r"(^|\.)shared\.weight$", weight.name) for weight in stored)
    found, seen = [], set()
    names = {weight.name for weight in stored}
    for weight in sorted(stored, key=lambda weight: bool(_HEAD.search(weight.name))):
        if weight.name.endswith(".decoder.bias") and weight.name.replace(".decoder.bias", ".bias") in names:
            continue  # BERT's heads have theirs under two names
        is_embedding, is_head = _EMBEDDING.search(weight.name), _HEAD.search(weight.name)
        if (is_embedding and (tied or shared)) or (is_head and tied):
            if weight.shape in seen:
                continue
            seen.add(weight.shape)
        if is_floating(weight):
            found.append(weight)
    return found


def is_floating(weight: Weight) -> bool:
    return _FLOATING.match(weight.dtype) is not None


def _is_tied(config: Mapping[str, Any]) -> bool:
    """transformers writes the key wherever the head is not tied, unless that is the family's own default."""
    if not config:
        return False
    inner = language_part(config)
    said = config.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
    family = FAMILIES.get(str(inner.get("model_type")))
    if said is None and family is not None:
        return bool(family.defaults.get("tie_word_embeddings", False))
    return said is not False
