"""The estimate of activations, beside what a real model takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import profile

from adamw_triton.activations import Batch, estimate
from adamw_triton.model_files.config import read_dimensions

transformers = pytest.importorskip("transformers")

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def peak(config: dict[str, Any], batch: Batch, dtype: torch.dtype) -> int:
    """Bytes that forward and backward allocate at most, with all gradients there already."""
    settings = transformers.LlamaConfig(**config, use_cache=False)
    model = transformers.LlamaForCausalLM._from_config(settings, attn_implementation="sdpa").to(dtype).train()
    if batch.checkpointing:
        model.gradient_checkpointing_enable()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    tokens = torch.zeros(batch.sequences, batch.length, dtype=torch.int64)
    with profile(profile_memory=True) as record:
        model(input_ids=tokens, labels=tokens).loss.backward()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        pytest.param({}, torch.float32, id="wide"),
        pytest.param({"num_hidden_layers": 16}, torch.float32, id="deep"),
        pytest.param({"vocab_size": 8000}, torch.float32, id="large vocabulary"),
        pytest.param({"num_hidden_layers": 2}, torch.bfloat16, id="bf16"),
        pytest.param({"num_hidden_layers": 2, "vocab_size": 4000}, torch.bfloat16, id="bf16, vocabulary"),
    ],
)
def test_a_real_model_takes_what_was_estimated(
    change: dict[str, int], dtype: torch.dtype, checkpointing: bool
) -> None:
    """Within 2% below and 5% above, over changes of several times in each term."""
    config = WIDE | change
    dimensions = read_dimensions(config)
    assert dimensions is not None
    batch = Batch(2, 64, checkpointing)
    real = peak(config, batch, dtype)
    told = estimate(dimensions, batch, dtype.itemsize)
    assert 0.98 * real < told < 1.05 * real, (real, told, told / real)


def test_it_grows_with_all_that_it_depends_on() -> None:
    dimensions = read_dimensions(WIDE)
    assert dimensions is not None
    least = estimate(dimensions, Batch(1, 64), 2)
    assert estimate(dimensions, Batch(2, 64), 2) == 2 * least == estimate(dimensions, Batch(1, 128), 2)
    assert estimate(dimensions, Batch(1, 64), 4) > least
    assert estimate(dimensions, Batch(1, 64), 2, adapted_inputs=600) == least + 64 * 4 * 600 // 6
    assert estimate(dimensions, Batch(1, 64, checkpointing=False), 2) > least
    for name in dimensions._fields:
        grown = dimensions._replace(**{name: 100 * getattr(dimensions, name)})
        assert estimate(grown, Batch(1, 64), 2) > least, name
    assert estimate(dimensions, Batch(1, 64), 2, largest_quantized=10**6) == least + 2 * 10**6
