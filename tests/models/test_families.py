"""Weights told from config.json are those of the model that transformers builds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from adamw_triton.models import ModelFileError
from adamw_triton.models.families import FAMILIES, HEADS, weights_of

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "pad_token_id": 0,
}
BIASED = {"attention_bias": True, "mlp_bias": True}


Shapes = dict[str, tuple[int, ...]]


def built(config: dict[str, Any]) -> Shapes:
    """By transformers, on the meta device."""
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def told(config: dict[str, Any]) -> Shapes:
    return {weight.name: weight.shape for weight in weights_of(config, "BF16")}


def assert_same(config: dict[str, Any], found: Shapes) -> None:
    """Experts lie in stacks since transformers 5, and are told one by one."""
    right = built(config)
    if FAMILIES[config["model_type"]].experts:
        assert sum(map(math.prod, found.values())) == sum(map(math.prod, right.values()))
        found, right = ({key: s for key, s in shapes.items() if "mlp" not in key and "moe" not in key}
                        for shapes in (found, right))  # fmt: skip
    assert found == right


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({}, id="as it comes"),
        pytest.param(BIASED, id="biased"),
        pytest.param({"head_dim": 24}, id="wide heads"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"tie_word_embeddings": False}, id="untied"),
    ],
)
def test_weights_are_those_that_transformers_makes(name: str, extra: dict[str, Any]) -> None:
    config = {"model_type": name, **SMALL, **extra}
    assert_same(config, told(config))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_smallest_file_means_what_transformers_takes_it_for(name: str) -> None:
    """Only what no family has a default for; where heads are shared by default, that must be said."""
    config = {"model_type": name, **SMALL}
    del config["num_key_value_heads"]
    if "num_key_value_heads" in FAMILIES[name].defaults:
        assert told(config) == told(config | {"num_key_value_heads": None})
        assert_same(config, told(config))
    else:
        with pytest.raises(ModelFileError, match="does not say num_key_value_heads"):
            told(config)


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(ModelFileError, match=r"model_type 'mamba' cannot be told from config\.json alone"):
        weights_of({"model_type": "mamba", **SMALL}, "BF16")


CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}


@pytest.mark.parametrize("labels", [{}, {"num_labels": 5}, {"id2label": {"0": "a"}, "label2id": {"a": 0}}])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CLASSES)
def test_heads_are_those_of_the_class(name: str, head: str, labels: dict[str, Any]) -> None:
    """Their names differ by release: not the shapes."""
    config = {"model_type": name, **SMALL, **labels, "architectures": [f"{CLASSES[name]}{head}"]}
    if not hasattr(transformers, config["architectures"][0]):
        pytest.skip("transformers has no such class")
    settings = transformers.CONFIG_MAPPING[name].from_dict(config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(settings)
    assert sorted(told(config).values()) == sorted(tuple(param.shape) for param in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLMEagle3",
        "Qwen2ForProcessRewardModel",
        "Llama",
        "FooModel",
        "GPT2LMHeadModel",
        7,
        ["X"],
    ],
)
def test_other_classes_are_refused_by_name(name: object) -> None:
    with pytest.raises(ModelFileError, match=r"^config\.json names the class .*[A-Z7].*$"):
        weights_of({"model_type": "llama", **SMALL, "architectures": [name]}, "BF16")


def test_a_class_may_be_written_in_other_letters() -> None:
    """As in the first conversions of Llama."""
    config = {"model_type": "llama", **SMALL, "architectures": ["LLaMAForCausalLM"]}
    assert told(config) == told({**config, "architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("change", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}])
def test_layers_that_differ_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match=f"says {next(iter(change))}="):
        weights_of({"model_type": "qwen3_moe", **SMALL, **change}, "BF16")
