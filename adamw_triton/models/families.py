"""Every weight of a decoder of the Llama family, from its config.json alone.

A family is data: what its config may leave out, and where it differs from Llama. The tests hold each
against the model that transformers builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from adamw_triton.models.config import size
from adamw_triton.models.weights import ModelFileError, Weight

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class UntoldError(ModelFileError):
    """The config does not tell the weights to this table.

    Args:
        what: is not told, as the beginning of a sentence.
        known: what would be, if that is a list.
        way: to change the config, if there is one.
    """

    def __init__(self, what: str, known: str = "", way: str = "") -> None:
        super().__init__(what)
        self.known = known
        self.way = way


class Family(NamedTuple):
    """Where one differs."""

    defaults: Mapping[str, Any] = {}
    """What transformers assumes of a key that is not in the file."""
    bias_keys: Mapping[str, str] = {}
    """Of a part of the layer, the key that gives its projections biases."""
    query_bias: bool = False
    """q, k and v have biases, whatever the file says."""
    head_norms: bool = False
    """q and k are normalized, each head alike."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    fused: bool = False
    """One projection makes q, k and v, and one gate and up."""
    experts: tuple[str, str] | None = None
    """The keys of their number in a layer and of their width; a router chooses."""
    alike: Mapping[str, Any] = {}
    """What these keys must say, if anything, for all layers to be alike."""


LARGEST = 1_000_000
"""Tensors; of all experts of DeepSeek-V3 there are 45,000."""
_HEADS_ALIKE = {"num_key_value_heads": None}
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
_ATTENTION = {"self_attn": "attention_bias"}
_FOUR_NORMS = (*Family().norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    "llama": Family(_HEADS_ALIKE, bias_keys=_ATTENTION | {"mlp": "mlp_bias"}),
    "mistral": Family(),
    "qwen2": Family(query_bias=True),
    "qwen3": Family({"head_dim": 128}, bias_keys=_ATTENTION, head_norms=True),
    "gemma": Family(_GEMMA, bias_keys=_ATTENTION),
    "gemma2": Family(_GEMMA, bias_keys=_ATTENTION, norms=_FOUR_NORMS),
    "gemma3_text": Family(_GEMMA, bias_keys=_ATTENTION, norms=_FOUR_NORMS, head_norms=True),
    "phi3": Family(_HEADS_ALIKE, fused=True),
    "granite": Family(_HEADS_ALIKE, bias_keys=_ATTENTION | {"mlp": "mlp_bias"}),
    "mixtral": Family({"num_local_experts": 8}, experts=("num_local_experts", "intermediate_size")),
    "qwen3_moe": Family(
        {"num_experts": 128},
        bias_keys=_ATTENTION,
        head_norms=True,
        experts=("num_experts", "moe_intermediate_size"),
        alike={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}


HEADS: Mapping[str, tuple[str, bool, int]] = {
    "ForCausalLM": ("lm_head", False, 0),
    "Model": ("", False, 0),
    "ForSequenceClassification": ("score", False, 0),
    "ForTokenClassification": ("score", True, 0),
    "ForQuestionAnswering": ("qa_outputs", True, 2),
}
"""By the end of the class's name: the head's, whether it has a bias, its rows; 0 for one a word or a label.
Reward models are classifiers of sequences."""


def weights_of(config: Mapping[str, Any], dtype: str) -> list[Weight]:
    """The weights that transformers gives the model of this config.

    Args:
        config: says the class in ``architectures``, else it is the causal language model.
        dtype: of the weights.

    Raises:
        UntoldError: the family or the class is not known, or a size is missing.
        ModelFileError: a size is absurd.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UntoldError(
            f"the weights of model_type {name!r:.60} cannot be told from config.json alone",
            ", ".join(FAMILIES),
        )
    family = FAMILIES[name]
    for key, value in family.alike.items():
        if config.get(key, value) != value:
            shown = f"{config[key]!r:.60}"
            raise UntoldError(f"config.json says {key}={shown}", f"models with {key}={value!r}")
    shapes = _shapes({**family.defaults, **config}, family, _head(config))
    return [Weight(name, shape, dtype) for name, shape in shapes]


def _head(config: Mapping[str, Any]) -> str:
    """The end of the class's name, behind that of the family; some write that in other letters."""
    classes = config.get("architectures")
    if not classes:
        return "ForCausalLM"
    name = classes[0] if isinstance(classes, list) else classes
    family = str(config["model_type"]).replace("_", "").removesuffix("text")
    for head in HEADS:
        if isinstance(name, str) and re.fullmatch(f"{family}(text)?{head}", name, re.IGNORECASE):
            return head
    raise UntoldError(
        f"config.json names the class {name!r:.60}",
        f"classes of {config['model_type']} that end in {', '.join(HEADS)}",
        "correct or remove its architectures",
    )


def _shapes(config: Mapping[str, Any], family: Family, head: str) -> Shapes:
    hidden, vocabulary = _required(config, "hidden_size"), _required(config, "vocab_size")
    layer = list(_layer(config, family, hidden))
    layers = _required(config, "num_hidden_layers")
    if layers * len(layer) > LARGEST:
        raise ModelFileError(f"config.json tells of {layers * len(layer):,} weights: no model has so many")
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(layers):
        for name, shape in layer:
            yield f"model.layers.{number}.{name}", shape
    yield "model.norm.weight", (hidden,)
    name, biased, rows = HEADS[head]
    if name == "lm_head":
        rows = 0 if config.get("tie_word_embeddings", False) else vocabulary
    elif name and not rows:
        rows = _labels(config)
    if rows:
        yield f"{name}.weight", (rows, hidden)
        if biased:
            yield f"{name}.bias", (rows,)


def _labels(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) and names else size(config, "num_labels") or 2


def _layer(config: Mapping[str, Any], family: Family, hidden: int) -> Shapes:
    count_key, width_key = family.experts or ("", "intermediate_size")
    heads, intermediate = _required(config, "num_attention_heads"), _required(config, width_key)
    if "num_key_value_heads" not in config:
        raise _missing("num_key_value_heads")
    head_dim = size(config, "head_dim") or hidden // heads
    if head_dim == 0:
        raise ModelFileError(f"config.json says num_attention_heads={heads}, more than hidden_size={hidden}")
    queries, keys = heads * head_dim, (size(config, "num_key_value_heads") or heads) * head_dim
    if family.fused:
        projections = {
            "self_attn.qkv_proj": (queries + 2 * keys, hidden),
            "mlp.gate_up_proj": (2 * intermediate, hidden),
        }
    else:
        projections = {f"self_attn.{letter}_proj": (rows, hidden) for letter, rows in
                       (("q", queries), ("k", keys), ("v", keys))}  # fmt: skip
    feeds = ["mlp"]
    if family.experts:
        experts = _required(config, count_key)
        projections["mlp.gate"] = (experts, hidden)
        feeds = [f"mlp.experts.{number}" for number in range(experts)]
    for feed in feeds:
        if not family.fused:
            projections |= {f"{feed}.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
        projections[f"{feed}.down_proj"] = (hidden, intermediate)
    projections["self_attn.o_proj"] = (hidden, queries)
    biased = tuple(part for part, key in family.bias_keys.items() if config.get(key))
    if family.query_bias:
        biased = ("self_attn.q", "self_attn.k", "self_attn.v")
    for name, shape in projections.items():
        yield f"{name}.weight", shape
        if name.startswith(biased):
            yield f"{name}.bias", shape[:1]
    if family.head_norms:
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    for name in family.norms:
        yield f"{name}.weight", (hidden,)


def _required(config: Mapping[str, Any], key: str) -> int:
    value = size(config, key)
    if value is None:
        raise _missing(key)
    return value


def _missing(key: str) -> UntoldError:
    return UntoldError(f"config.json does not say {key}", way="add it")
