"""Models of which only the size is known: exactly of that size, and never more hopeful than a real one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_triton.cli import main
from adamw_triton.models import sketches
from adamw_triton.models.families import weights_of
from adamw_triton.models.sketch import LARGEST, SMALLEST
from tests.amount import WHOLE


@given(st.integers(1, LARGEST) | st.integers(SMALLEST, 2 * 10**9))
def test_sketches_have_exactly_the_parameters_that_were_asked_for(parameters: int) -> None:
    for model in sketches(parameters):
        assert sum(weight.numel for weight in model.weights) == parameters
        assert (model.dimensions is None) == (parameters < SMALLEST)
        assert all(size >= 0 for weight in model.weights for size in weight.shape)


def test_they_say_what_was_guessed() -> None:
    model = sketches(7 * 10**9)[0]
    assert model.dimensions is not None
    for size in (model.dimensions.vocabulary, model.dimensions.layers, model.dimensions.hidden):
        assert f"{size:,}" in model.counted


# Of published config.json files: hidden size, layers, words, feed-forward, heads, heads of keys, tied.
KNOWN = {
    "SmolLM2-360M": (960, 32, 49152, 2560, 15, 5, True),
    "Qwen2.5-0.5B": (896, 24, 151936, 4864, 14, 2, True),
    "MobileLLM-1B": (1280, 54, 32000, 3584, 20, 5, True),
    "gemma-3-1b": (1152, 26, 262144, 6912, 4, 1, True),
    "TinyLlama-1.1B": (2048, 22, 32000, 5632, 32, 4, False),
    "Llama-3.2-1B": (2048, 16, 128256, 8192, 32, 8, True),
    "salamandra-2b": (2048, 24, 256000, 5440, 16, 16, False),
    "gemma-2b": (2048, 18, 256000, 16384, 8, 1, True),
    "Qwen2.5-3B": (2048, 36, 151936, 11008, 16, 2, True),
    "Llama-3.2-3B": (3072, 28, 128256, 8192, 24, 8, True),
    "Phi-3-mini": (3072, 32, 32064, 8192, 32, 32, False),
    "Qwen3-4B": (2560, 36, 151936, 9728, 32, 8, True),
    "Llama-2-7B": (4096, 32, 32000, 11008, 32, 32, False),
    "Qwen2.5-7B": (3584, 28, 152064, 18944, 28, 4, False),
    "Llama-3-8B": (4096, 32, 128256, 14336, 32, 8, False),
    "Aya-23-8B": (4096, 32, 256000, 14336, 32, 8, True),
    "gemma-7b": (3072, 28, 256000, 24576, 16, 16, True),
    "gemma-2-9b": (3584, 42, 256000, 14336, 16, 8, True),
    "Yi-9B": (4096, 48, 64000, 11008, 32, 4, False),
    "Mistral-Nemo-12B": (5120, 40, 131072, 14336, 32, 8, False),
    "Qwen2.5-14B": (5120, 48, 152064, 13824, 40, 8, False),
    "gemma-2-27b": (4608, 46, 256000, 36864, 32, 16, True),
    "Qwen2.5-32B": (5120, 64, 152064, 27648, 40, 8, False),
    "Command-R-35B": (8192, 40, 256000, 22528, 64, 64, True),
    "DeepSeek-67B": (8192, 95, 102400, 22016, 64, 8, False),
    "Llama-3.1-70B": (8192, 80, 128256, 28672, 64, 8, False),
    "Command-R-plus-104B": (12288, 64, 256000, 33792, 96, 8, True),
    "Llama-3.1-405B": (16384, 126, 128256, 53248, 128, 8, False),
}
OPTIONS = (
    "",
    "--accumulation 4",
    "--no-checkpointing",
    "--seq 512 --batch 8",
    "--seq 16384",
    "--lora 16",
    "--lora 64 --lora-targets all-linear --no-checkpointing",
    "--lora 16 --quantized-base 4",
    "--lora 16 --quantized-base 4 --lora-targets all-linear --seq 256",
)
STRIDE = 1 if WHOLE else 11
"""Of all models with all options, one in so many; a prime that is no divisor of either."""


def config_of(name: str) -> dict[str, Any]:
    hidden, layers, words, width, heads, keys, tied = KNOWN[name]
    head = 128 if name == "gemma-2-27b" else 256 if "gemma" in name else hidden // heads
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": words,
        "intermediate_size": width, "num_attention_heads": heads, "num_key_value_heads": keys,
        "tie_word_embeddings": tied, "dtype": "bfloat16", "head_dim": head,
    }  # fmt: skip


def needed(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    """Bytes of the GPU, all state in 32 bits."""
    main(["plan", *arguments, "--gpu", "80GiB", "--host-memory", "64GiB", "--json"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    return int(plan["candidates"][0]["gpu_bytes"] - plan["devices"][0]["room"])


@pytest.mark.parametrize(("name", "options"), list(itertools.product(KNOWN, OPTIONS))[::STRIDE])
def test_a_number_never_promises_more_than_the_config_of_that_size(
    name: str, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    count = sum(weight.numel for weight in weights_of(config_of(name), "BF16"))
    known = needed(capsys, str(tmp_path), *options.split())
    assert needed(capsys, "--params", str(count), *options.split()) >= known
