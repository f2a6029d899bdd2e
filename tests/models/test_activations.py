"""The estimate of activations, beside what a real model takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.profiler import profile

from adamw_triton.models.activations import Batch, Workload, estimate
from adamw_triton.models.config import read_dimensions
from adamw_triton.state.placement import live_bytes
from adamw_triton.step.buckets import Buckets

transformers = pytest.importorskip("transformers")

BUCKET = 200_000
"""Bytes of gradients."""
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def measured(config: dict[str, Any], batch: Batch, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that forward and backward allocate at most beside the gradients, all or those that are there at
    one time; and those of these."""
    settings = transformers.LlamaConfig(**config, use_cache=False)
    model = transformers.LlamaForCausalLM._from_config(settings, attn_implementation="sdpa").to(dtype).train()
    if batch.checkpointing:
        model.gradient_checkpointing_enable()
    buckets = Buckets(BUCKET)
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if batch.accumulating else None
        if batch.released:
            param.register_post_accumulate_grad_hook(partial(free, buckets))
    tokens = torch.zeros(batch.sequences, batch.length, dtype=torch.int64)
    with profile(profile_memory=True) as record:
        model(input_ids=tokens, labels=tokens).loss.backward()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    sizes = [param.nbytes for param in model.parameters()]
    gradients = live_bytes(sizes, BUCKET) if batch.released else sum(sizes)
    return most if batch.accumulating else most - gradients, gradients


def free(buckets: Buckets, param: torch.Tensor) -> None:
    """As gradient release does, but for the step."""
    for bucket in buckets.arrived(param):
        for each in bucket:
            each.grad = None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("gradients_are", ["accumulated", "made", "released"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("change", "length", "dtype"),
    [
        pytest.param({}, 64, torch.float32, id="short"),
        pytest.param({}, 512, torch.float32, id="long"),
        pytest.param({"num_hidden_layers": 16}, 128, torch.float32, id="deep"),
        pytest.param({"vocab_size": 8000}, 64, torch.float32, id="large vocabulary"),
        pytest.param({"vocab_size": 8000}, 512, torch.float32, id="large vocabulary, long"),
        pytest.param({"vocab_size": 8000, "tie_word_embeddings": True}, 64, torch.float32, id="tied"),
        pytest.param({"tie_word_embeddings": True}, 512, torch.float32, id="tied, long"),
        pytest.param({"num_hidden_layers": 2}, 128, torch.bfloat16, id="bf16"),
        pytest.param({"num_hidden_layers": 2, "vocab_size": 4000}, 64, torch.bfloat16, id="bf16, vocabulary"),
    ],
)
def test_a_real_model_takes_what_was_estimated(
    change: dict[str, int], length: int, dtype: torch.dtype, checkpointing: bool, gradients_are: str
) -> None:
    """Beside the gradients, which are told exactly: never 2% more; and no less than a tenth, and the weights
    of a layer, whose gradients are counted as there while it is in backward."""
    config = SHAPE | change
    dimensions, _ = read_dimensions(config)
    assert dimensions is not None
    batch = Batch(1, length, checkpointing, gradients_are == "accumulated", gradients_are == "released")
    real, gradients = measured(config, batch, dtype)
    tied = bool(config["tie_word_embeddings"])
    told = estimate(dimensions, batch, Workload(dtype.itemsize, gradients, tied))
    layer = (3 * 128 * 512 + 3 * 128 * 128) * dtype.itemsize
    assert 0.98 * (real + gradients) < told + gradients < 1.1 * (real + gradients) + layer, (real, told)


def test_it_grows_with_all_that_it_depends_on() -> None:
    dimensions, _ = read_dimensions(SHAPE)
    assert dimensions is not None
    frozen = Workload(2)
    least = estimate(dimensions, Batch(1, 64), frozen)
    assert estimate(dimensions, Batch(2, 64), frozen) == 2 * least
    assert estimate(dimensions, Batch(1, 128), frozen) == 2 * least
    assert estimate(dimensions, Batch(1, 64), Workload(4)) > least
    assert estimate(dimensions, Batch(1, 64), Workload(2, adapted_inputs=600)) == least + 64 * 4 * 600 // 6
    assert estimate(dimensions, Batch(1, 64, checkpointing=False), frozen) > least
    assert estimate(dimensions, Batch(1, 64), Workload(2, largest_quantized=10**6)) == least + 2 * 10**6
    for name in set(dimensions._fields) - {"visited"}:  # that is in the width of the feed-forward already
        grown = dimensions._replace(**{name: 100 * getattr(dimensions, name)})
        assert estimate(grown, Batch(1, 64), frozen) > least, name
