"""What is trained of a model, and what only lies there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamw_triton.models import ModelFileError, Weight, read_model
from adamw_triton.models.activations import Workload
from adamw_triton.models.finetuning import (
    DTYPES,
    TARGETS,
    Run,
    adapted,
    dtype_of,
    is_linear,
    nf4_bytes,
    tensors,
    workload,
)

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
LLAMA = read_model(CONFIGS / "Llama-2-7B").weights
HIDDEN, LAYERS, FEED, VOCABULARY = 4096, 32, 11008, 32000
LINEAR = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * FEED)
TOTAL = 6_738_415_616


def trained(found: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in found if tensor.requires_grad)


def frozen_bytes(found: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in found if not tensor.requires_grad)


def test_without_lora_all_is_trained_as_it_is_stored_or_asked_for() -> None:
    for run, dtype in ((Run(), torch.float16), (Run(torch.bfloat16), torch.bfloat16)):
        found = tensors(LLAMA, run)
        assert [(tuple(tensor.shape), tensor.dtype) for tensor in found] == [(w.shape, dtype) for w in LLAMA]
        assert all(tensor.is_meta and tensor.requires_grad and tensor.is_leaf for tensor in found)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", LAYERS * 4 * (HIDDEN + HIDDEN)),
        ("all-linear", LAYERS * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + FEED))),
    ],
)
def test_lora_trains_two_adapters_a_projection(targets: str, expected: int) -> None:
    """[rank, n] and [m, rank] of [m, n], in fp32 whatever the model's dtype; the model is frozen."""
    found = tensors(LLAMA, Run(rank=16, targets=targets))
    assert trained(found) == 16 * expected
    assert {tensor.dtype for tensor in found if tensor.requires_grad} == {torch.float32}
    assert frozen_bytes(found) == 2 * TOTAL


def test_a_quantized_base_takes_9_16ths_of_a_byte_a_projection() -> None:
    """Embeddings, norms and the head stay as they are."""
    found = tensors(LLAMA, Run(rank=16, quantized=True))
    assert frozen_bytes(found) == LINEAR * 9 // 16 + 2 * (TOTAL - LINEAR)


@pytest.mark.parametrize(("numel", "expected"), [(64, 36), (128, 72), (1, 5), (65, 33 + 8)])
def test_nf4_bytes(numel: int, expected: int) -> None:
    assert nf4_bytes(numel) == expected


def test_nf4_bytes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(96, 200), blocksize=64, quant_type="nf4")
    assert nf4_bytes(96 * 200) == packed.nbytes + state.absmax.nbytes


NAMES = {
    "model.layers.0.self_attn.q_proj.weight": True,
    "model.layers.0.mlp.down_proj.weight": True,
    "transformer.h.0.attn.c_attn.weight": True,
    "gpt_neox.layers.0.attention.query_key_value.weight": True,
    "encoder.layer.0.attention.output.dense.weight": True,
    "layers.0.attention.wq.weight": True,
    "lm_head.weight": False,
    "output.weight": False,
    "embed_out.weight": False,
    "model.embed_tokens.weight": False,
    "transformer.wte.weight": False,
    "transformer.wpe.weight": False,
    "bert.embeddings.word_embeddings.weight": False,
    "tok_embeddings.weight": False,
    "model.layers.0.self_attn.rotary.inv_freq": False,
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_projections_are_told_by_name(name: str, expected: bool) -> None:
    assert is_linear(Weight(name, (4, 4), "BF16")) is expected
    assert not is_linear(Weight(name, (4,), "BF16"))


def test_every_family_of_attention_is_found() -> None:
    for name in (
        "self_attn.q_proj",
        "attn.c_attn",
        "attention.wq",
        "SelfAttention.q",
        "attention.self.query",
    ):
        weight = Weight(f"layers.0.{name}.weight", (4, 4), "BF16")
        assert adapted([weight], Run(rank=2)) == [weight]
    for name in ("mlp.up_proj", "patterns.proj"):
        with pytest.raises(ModelFileError, match="no projections that --lora-targets attention means"):
            adapted([Weight(f"layers.0.{name}.weight", (4, 4), "BF16")], Run(rank=2))


def test_integers_are_never_trained() -> None:
    """Position ids, or weights that are packed: their bytes count."""
    stored = [Weight("ids", (10,), "I64"), Weight("mask", (10,), "BOOL"), Weight("w", (4,), "F32")]
    ids, mask, weight = tensors(stored, Run())
    assert (ids.nbytes, mask.nbytes, weight.nbytes) == (80, 10, 16)
    assert [tensor.requires_grad for tensor in (ids, mask, weight)] == [False, False, True]
    with pytest.raises(ModelFileError, match="no floating point weights: nothing can be trained"):
        tensors(stored[:2], Run())


def test_weights_that_are_packed_already_have_no_adapters() -> None:
    packed = Weight("layers.0.self_attn.q_proj.weight", (8, 1), "U8")
    with pytest.raises(ModelFileError, match="is stored quantized, as U8: name the original model"):
        tensors([packed], Run(rank=2))


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3"])
def test_weights_of_other_floats_need_a_dtype(dtype: str) -> None:
    stored = [Weight("w", (4,), dtype)]
    with pytest.raises(ModelFileError, match=f"'w' is stored as {dtype}: give the --dtype to train in"):
        tensors(stored, Run())
    assert tensors(stored, Run(torch.bfloat16))[0].dtype is torch.bfloat16


def test_the_dtype_that_a_model_computes_in() -> None:
    assert dtype_of(LLAMA, Run()) is torch.float16
    assert dtype_of(LLAMA, Run(torch.float32)) is torch.float32
    mixed = [Weight("norm", (4,), "F32"), Weight("w", (4, 4), "BF16"), Weight("ids", (99,), "I64")]
    assert dtype_of(mixed, Run()) is torch.bfloat16


def test_what_the_estimate_of_activations_is_told() -> None:
    assert workload(LLAMA, Run()) == Workload(2, gradients=2 * TOTAL)
    assert workload(LLAMA, Run(torch.float32)) == Workload(4, gradients=4 * TOTAL)
    tied = [weight for weight in LLAMA if weight.name != "lm_head.weight"]
    assert workload(tied, Run()) == Workload(2, gradients=2 * (TOTAL - VOCABULARY * HIDDEN), tied=True)
    lora = workload(LLAMA, Run(rank=8, targets="all-linear", quantized=True))
    inputs = LAYERS * (6 * HIDDEN + FEED)
    assert lora == Workload(2, adapted_inputs=inputs, largest_quantized=HIDDEN * FEED)


def test_the_command_line_knows_the_same_names() -> None:
    from adamw_triton.commands import plan

    assert set(plan.DTYPES) == set(DTYPES)
    assert plan.TARGETS == TARGETS
