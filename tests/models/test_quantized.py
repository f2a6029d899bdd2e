"""Packed weights: every format is told by config or names, and never counted as it lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adamw_triton.models import ModelFileError, read_model
from tests.models.files import header_of, write

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320,
    "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, tuple[str, tuple[int, ...]]]
FORMATS: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "GPTQ": (
        {f"{Q}.qweight": ("I32", (8, 64)), f"{Q}.scales": ("F16", (1, 64))},
        {"quant_method": "gptq", "bits": 4},
    ),
    "AWQ": (
        {f"{Q}.qweight": ("I32", (64, 8)), f"{Q}.qzeros": ("I32", (1, 8))},
        {"quant_method": "awq", "bits": 4},
    ),
    "bitsandbytes, 8 bits": (
        {f"{Q}.weight": ("I8", (64, 64)), f"{Q}.SCB": ("F32", (64,))},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "FP8": (
        {f"{Q}.weight": ("F8_E4M3", (64, 64)), f"{Q}.weight_scale_inv": ("F32", (1, 1))},
        {"quant_method": "fp8"},
    ),
    "compressed-tensors": (
        {f"{Q}.weight_packed": ("I32", (64, 8)), f"{Q}.weight_scale": ("BF16", (64, 1))},
        {"quant_method": "compressed-tensors"},
    ),
    "MXFP4": (
        {"model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (4, 64, 2, 16))},
        {"quant_method": "mxfp4"},
    ),
    "HQQ": ({f"{Q}.W_q": ("U8", (32, 64))}, {"quant_method": "hqq"}),
    "EETQ": (
        {f"{Q}.weight": ("I8", (64, 64)), f"{Q}.weight_scales": ("F16", (64,))},
        {"quant_method": "eetq"},
    ),
    "AQLM": ({f"{Q}.codebooks": ("F16", (1, 256, 1, 8))}, {"quant_method": "aqlm"}),
    "quanto": ({f"{Q}.weight._data": ("I8", (64, 64))}, {"quant_method": "quanto"}),
    "MLX": ({f"{Q}.weight": ("U32", (640, 80))}, {"group_size": 64, "bits": 4}),
    "nobody's": ({f"{Q}.weight": ("U8", (65, 64))}, {"bits": 3}),
}
NF4: Tensors = {
    f"{Q}.weight": ("U8", (64 * 64 // 2, 1)),
    f"{Q}.weight.absmax": ("U8", (64,)),
    f"{Q}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
}
WHOLE = 2 * 320 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64 + 2 * 64)


def write_folder(path: Path, config: dict[str, Any] | None, tensors: Tensors | None) -> Path:
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        header, end = {}, 0
        for name, (dtype, shape) in {"model.embed_tokens.weight": ("BF16", (320, 64)), **tensors}.items():
            part, count = header_of({name: shape}, dtype)
            header[name] = {**part[name], "data_offsets": [end, end + count]}
            end += count
        write(path / "model.safetensors", header, end)
    return path


@pytest.mark.parametrize("told_by", ["both", "names", "config", "config alone", "a part's config"])
@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_are_known_by_name(name: str, told_by: str, tmp_path: Path) -> None:
    """And counted as what they were, from the config."""
    tensors, description = FORMATS[name]
    plain: Tensors = {f"{Q}.weight": ("BF16", (64, 64))}
    key = "quantization" if name == "MLX" else "quantization_config"
    config: dict[str, Any] | None = {**LLAMA, key: description}
    if told_by == "a part's config":
        config = {**LLAMA, "text_config": {key: description}}
    elif told_by == "names":
        config = LLAMA
    files = None if told_by == "config alone" else tensors if told_by in ("both", "names") else plain
    model = read_model(write_folder(tmp_path, config, files))
    assert model.quantized is not None
    assert not model.quantized.is_4bit_base
    assert sum(weight.numel for weight in model.weights) == WHOLE
    assert {weight.dtype for weight in model.weights} == {"F32" if told_by == "config alone" else "BF16"}


@pytest.mark.parametrize("files", [NF4, None])
@pytest.mark.parametrize(
    "description",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
        {"quant_method": "bitsandbytes"},
        {"load_in_4bit": True},
    ],
)
def test_a_base_in_4_bits_is_read_as_what_it_was(
    description: dict[str, Any], files: Tensors | None, tmp_path: Path
) -> None:
    model = read_model(write_folder(tmp_path, {**LLAMA, "quantization_config": description}, files))
    assert model.quantized is not None
    assert model.quantized.is_4bit_base
    assert sum(weight.numel for weight in model.weights) == WHOLE
    assert {weight.dtype for weight in model.weights} == {"BF16" if files else "F32"}


@pytest.mark.parametrize("name", [*FORMATS, "bitsandbytes, 4 bits"])
def test_without_a_config_codes_do_not_tell_what_they_were(name: str, tmp_path: Path) -> None:
    tensors = FORMATS[name][0] if name in FORMATS else NF4
    with pytest.raises(
        ModelFileError, match=r"are codes \(.*\), and tell no shapes: put its config\.json beside, or name"
    ):
        read_model(write_folder(tmp_path, None, tensors))


BUFFERS: Tensors = {
    "h.0.attn.bias": ("U8", (1, 1, 128, 128)),
    "h.0.attn.masked_bias": ("F32", ()),
    "embeddings.position_ids": ("I32", (1, 8192)),
    "h.0.relative_position_index": ("I32", (81, 81)),
    "h.0.rotary_emb.inv_freq": ("F32", (32,)),
    "bn.num_batches_tracked": ("I64", ()),
}


def test_buffers_of_whole_numbers_are_no_codes(tmp_path: Path) -> None:
    model = read_model(write_folder(tmp_path, None, BUFFERS))
    assert [weight.name for weight in model.weights] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_numbers_of_any_width_are_no_codes(dtype: str, tmp_path: Path) -> None:
    """Of F8 only scales beside them tell."""
    plain: Tensors = {f"{Q}.weight": (dtype, (128, 64))}
    assert read_model(write_folder(tmp_path, None, plain)).quantized is None


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "U8", "I32"])
def test_what_nobody_computes_in_is_codes(dtype: str, tmp_path: Path) -> None:
    packed = read_model(write_folder(tmp_path, LLAMA, {f"{Q}.weight": (dtype, (128, 64))})).quantized
    assert packed is not None
    assert packed.format == f"an unknown format ('{Q}.weight' is {dtype})"
