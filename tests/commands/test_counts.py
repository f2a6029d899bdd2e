"""`adamw-triton plan` counts what is trained, not what lies on disk: with transformers and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adamw_triton.cli import main
from tests.models.files import header_of, write

HIDDEN, WIDE, LAYERS, WORDS = 256, 768, 4, 4096
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": WORDS, "tie_word_embeddings": True,
    "dtype": "bfloat16",
}  # fmt: skip
UNTIED = LLAMA | {"tie_word_embeddings": False}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": WORDS,
    "n_positions": 128,
}
NOBODYS = {"model_type": "nobody's", "architectures": ["NobodysForCausalLM"], "hidden_size": 256}

Tensors = dict[str, tuple[str, tuple[int, ...]]]
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (64, HIDDEN), "self_attn.v_proj": (64, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}  # fmt: skip
BODY = LAYERS * (sum(rows * columns for rows, columns in PROJECTIONS.values()) + 2 * HIDDEN) + HIDDEN
TABLE = WORDS * HIDDEN
GPT2_COUNT = (WORDS + 128 + 2) * 256 + 2 * (12 * 256 * 256 + 13 * 256)


def llama(packed: bool = False, **more: tuple[str, tuple[int, ...]]) -> Tensors:
    found: Tensors = {
        "model.embed_tokens.weight": ("BF16", (WORDS, HIDDEN)),
        "model.norm.weight": ("BF16", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = ("BF16", (HIDDEN,))
        for name, (rows, columns) in PROJECTIONS.items():
            key = f"model.layers.{layer}.{name}.weight"
            found[key] = ("U8", (rows * columns // 2, 1)) if packed else ("BF16", (rows, columns))
            if packed:
                found[f"{key}.absmax"] = ("F32", (rows * columns // 64,))
                found[f"{key}.quant_state.bitsandbytes__nf4"] = ("U8", (80,))
    return found | {name.replace("__", "."): value for name, value in more.items()}


def gpt2() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (WORDS, 256), "wpe.weight": (128, 256)}
    shapes |= {"ln_f.weight": (256,), "ln_f.bias": (256,)}
    for layer in range(2):
        for name, (rows, columns) in {
            "attn.c_attn": (256, 768), "attn.c_proj": (256, 256),
            "mlp.c_fc": (256, 1024), "mlp.c_proj": (1024, 256),
        }.items():  # fmt: skip
            shapes |= {f"h.{layer}.{name}.weight": (rows, columns), f"h.{layer}.{name}.bias": (columns,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (256,), f"h.{layer}.{name}.bias": (256,)}
        shapes[f"h.{layer}.attn.bias"] = (1, 1, 128, 128)
        shapes[f"h.{layer}.attn.masked_bias"] = ()
    return {name: ("F32", shape) for name, shape in shapes.items()}


HEAD = {"lm_head__weight": ("BF16", (WORDS, HIDDEN))}
RIGHT: dict[str, tuple[dict[str, Any], Tensors | None, int]] = {
    "tied": (LLAMA, llama(), TABLE + BODY),
    "tied, the head stored too": (LLAMA, llama(**HEAD), TABLE + BODY),
    "untied": (UNTIED, llama(**HEAD), 2 * TABLE + BODY),
    "causal masks": (GPT2, gpt2(), GPT2_COUNT),
    "causal masks, in whole numbers": (
        GPT2,
        {
            name: ("U8" if name.endswith(".attn.bias") else dtype, shape)
            for name, (dtype, shape) in gpt2().items()
        },
        GPT2_COUNT,
    ),
    "frequencies": (
        LLAMA,
        llama(model__layers__0__self_attn__rotary_emb__inv_freq=("F32", (16,))),
        TABLE + BODY,
    ),
    "a config alone": (UNTIED, None, 2 * TABLE + BODY),
    "a reward model": (
        UNTIED | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
        None,
        TABLE + BODY + HIDDEN,
    ),
    "a model that embeds": (UNTIED | {"architectures": ["LlamaModel"]}, None, TABLE + BODY),
    "a type that nobody knows": (NOBODYS, llama(**HEAD), TABLE + BODY),
}


def folder(path: Path, config: dict[str, Any], tensors: Tensors | None) -> str:
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        header, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            part, count = header_of({name: shape}, dtype)
            header[name] = {**part[name], "data_offsets": [end, end + count]}
            end += count
        write(path / "model.safetensors", header, end)
    return str(path)


@pytest.fixture(params=["with transformers", "without"])
def builder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who counts, as far as it is known: the beginning of what the plan says."""
    if request.param == "without":
        monkeypatch.setitem(sys.modules, "transformers", None)
        return "not installed"
    pytest.importorskip("transformers")
    return "transformers "


def planned(path: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    main(["plan", path, "--gpu", "24GiB", "--host-memory", "64GiB", "--json", *options])
    output = capsys.readouterr()
    assert output.err == ""
    return dict(json.loads(output.out))


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_trained_is_counted(
    case: str, builder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors, right = RIGHT[case]
    found = planned(folder(tmp_path, config, tensors), capsys)
    assert found["parameters"] == found["trained"] == right
    assert builder in found["counted"]


def test_a_base_in_4_bits_is_for_adapters(
    builder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same plan as the original's, held in 4 bits; without adapters there is nothing to train."""
    config = LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path = folder(tmp_path, config, llama(packed=True))
    found = planned(path, capsys, "--lora", "8")
    (tmp_path / "original").mkdir()
    original = planned(
        folder(tmp_path / "original", LLAMA, llama()), capsys, "--lora", "8", "--quantized-base", "4"
    )
    assert found["parameters"] == TABLE + BODY
    assert found["plan"] == original["plan"]
    assert main(["plan", path, "--gpu", "24GiB"]) == 2
    assert (
        "is held in 4 bits (bitsandbytes), which cannot be trained themselves: give"
        in capsys.readouterr().err
    )


def test_a_count_of_something_else_than_the_files_hold_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    found = planned(folder(tmp_path, LLAMA, llama(**HEAD)), capsys)
    assert found["counted"].endswith(f" as LlamaForCausalLM; the files hold {2 * TABLE + BODY:,} numbers")


UNESTIMATED = {
    "vit": ({"model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            "nothing tells vocab_size"),
    "t5": ({"model_type": "t5", "d_model": 64, "num_layers": 2, "vocab_size": 96},
           "there is no estimate for an encoder with a decoder"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNESTIMATED)
def test_activations_that_cannot_be_estimated_are_said_to_be_unknown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    config, reason = UNESTIMATED[name]
    found = planned(folder(tmp_path, config, None), capsys)
    assert found["activations"] is None
    assert found["activations_from"] == f"not counted: {reason}; give --activations"
    given = planned(str(tmp_path), capsys, "--activations", "1GiB")
    assert given["activations"] == 1 << 30


def test_an_estimate_by_other_rules_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    found = planned(folder(tmp_path, GPT2, None), capsys)
    assert found["activations_from"].endswith("; as if a gpt2 were a Llama of its sizes")


@pytest.mark.slow
def test_a_process_of_its_own_prints_nothing_but_json(tmp_path: Path) -> None:
    """Whatever transformers and what it imports would like to say."""
    pytest.importorskip("transformers")
    path = folder(tmp_path, {**GPT2, "architectures": ["GPT2LMHeadModel"], "eos_token_id": 10**6}, None)
    command = [
        sys.executable,
        "-m",
        "adamw_triton",
        "plan",
        path,
        "--gpu",
        "T4",
        "--host-memory",
        "1GiB",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=os.environ)
    assert done.stderr == ""
    assert json.loads(done.stdout)["parameters"] == GPT2_COUNT
