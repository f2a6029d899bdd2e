"""Groups of transformers' models, against counts that were worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adamw_triton
from tests.architectures.tiny import DECODER, TINY

transformers = pytest.importorskip("transformers")

GEMMA = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], **DECODER, "head_dim": 8}

# (depth, decays): (tensors, elements). The width is 32 and the inner one 48; 96 words; 2 layers.
# Llama: q and o 32*32, k and v 16*32, three of the MLP 48*32: 7680.
LLAMA = {
    (0, False): (1, 96 * 32),
    (1, True): (7, 7680),
    (1, False): (2, 2 * 32),
    (2, True): (7, 7680),
    (2, False): (2, 2 * 32),
    (3, True): (1, 96 * 32),  # lm_head
    (3, False): (1, 32),  # the last norm
}
# BERT and ViT: q, k, v, o 32*32, two of the MLP 48*32; their biases, 5*32 + 48, and two norms, 4*32.
ENCODED = {(depth, True): (6, 7168) for depth in (1, 2)} | {(depth, False): (10, 336) for depth in (1, 2)}
BY_HAND: dict[str, tuple[dict[str, Any], dict[tuple[int, bool], tuple[int, int]]]] = {
    "llama": (TINY["llama"], LLAMA),
    # Tied: an embedding by one of its names.
    "llama, tied": (TINY["llama, tied"], {key: LLAMA[key] for key in LLAMA if key != (3, True)}),
    "gemma": (GEMMA, {key: LLAMA[key] for key in LLAMA if key != (3, True)}),
    # Three biases more in a layer, 32 + 16 + 16.
    "qwen2": (TINY["qwen2"], LLAMA | {(1, False): (5, 128), (2, False): (5, 128)}),
    "gpt2": (
        TINY["gpt2"],
        {
            (0, False): (2, (96 + 24) * 32),
            # Conv1D: 32*96, 32*32, 32*128, 128*32; its biases 96, 32, 128, 32, and norms 4*32.
            **{(depth, True): (4, 12288) for depth in (1, 2)},
            **{(depth, False): (8, 416) for depth in (1, 2)},
            (3, False): (2, 64),
        },
    ),
    "t5": (
        TINY["t5"],
        {
            (0, False): (1, 96 * 32),
            # Encoder: four of 32*32 and two of 48*32, two norms. Decoder: eight and two, three norms.
            **{(depth, True): (6 + 10, 7168 + 11264) for depth in (1, 2)},
            (1, False): (5 + 2, 5 * 32 + 2 * 32 * 4),  # relative positions, an embedding in each first block
            (2, False): (5, 5 * 32),
            (3, False): (2, 2 * 32),
        },
    ),
    "bert": (
        TINY["bert"],
        {
            (0, False): (5, (96 + 512 + 2) * 32 + 64),
            **ENCODED,
            (3, True): (1, 32 * 32),
            (3, False): (4, 96 + 32 + 64),
        },
    ),
    "vit": (
        TINY["vit"],
        {
            (0, True): (1, 32 * 3 * 14 * 14),  # the convolution of patches
            (0, False): (3, 32 + 5 * 32 + 32),  # cls_token, position_embeddings, its bias
            **ENCODED,
            (3, True): (1, 2 * 32),
            (3, False): (3, 64 + 2),
        },
    ),
}


def made(config: dict[str, Any]) -> Any:
    """On the meta device; skipped where this release cannot."""
    try:
        with torch.device("meta"):
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            return getattr(transformers, config["architectures"][0])(settings)
    except (AttributeError, KeyError, TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"transformers {transformers.__version__} does not make it: {error}")


@pytest.mark.parametrize("name", BY_HAND)
def test_counts(name: str) -> None:
    config, by_hand = BY_HAND[name]
    groups = adamw_triton.param_groups(made(config), weight_decay=0.1, lr=1.0, layer_decay=0.5)
    found = {
        (group["depth"], group["weight_decay"] > 0): (
            len(group["params"]),
            sum(param.numel() for param in group["params"]),
        )
        for group in groups
    }
    assert found == by_hand
    assert [group["lr"] for group in groups] == [0.5 ** (3 - group["depth"]) for group in groups]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


@pytest.mark.parametrize("name", BY_HAND)
def test_counts_without_depth(name: str) -> None:
    config, by_hand = BY_HAND[name]
    groups = adamw_triton.param_groups(made(config), weight_decay=0.1, lr=1e-3)
    found = {group["weight_decay"] > 0: sum(param.numel() for param in group["params"]) for group in groups}
    for decays in (False, True):
        assert found[decays] == sum(by_hand[key][1] for key in by_hand if key[1] == decays)
    assert len(groups) == 2
    assert all(group["lr"] == 1e-3 and "depth" not in group for group in groups)


@pytest.mark.parametrize("name", TINY)
def test_any_architecture(name: str) -> None:
    """Two layers each, so four rates; every parameter once."""
    model = made(TINY[name])
    groups = adamw_triton.param_groups(model, weight_decay=0.1, lr=1.0, layer_decay=0.5)
    assert sorted(id(param) for group in groups for param in group["params"]) == sorted(
        id(param) for param in model.parameters() if param.requires_grad
    )
    named = dict(model.named_parameters())
    for group in groups:
        assert all(
            named[key] is param for key, param in zip(group["param_names"], group["params"], strict=True)
        )
        if group["weight_decay"]:
            assert all(param.ndim > 1 for param in group["params"])
    depth = {key: group["depth"] for group in groups for key in group["param_names"]}
    for key, at in depth.items():
        (number, *_) = [int(part) for part in key.split(".") if part.isdigit()] or [None]
        if number is not None and ".merger." not in key:
            assert at == number + 1, key
    if name != "opt":  # it registers its last norm before its layers, and has no head of its own
        assert sorted({group["depth"] for group in groups}) == [0, 1, 2, 3]
