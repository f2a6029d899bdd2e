"""Architectures as transformers builds them: the numbers of published models, and what was really made."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adamw_triton.architectures import build
from adamw_triton.models import Model, ModelFileError, read_model
from adamw_triton.models.architecture import CannotBuildError
from adamw_triton.models.finetuning import Run, tensors
from tests.architectures.full import FULL
from tests.architectures.tiny import TINY
from tests.models.files import write_model

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


def total(model: Model) -> int:
    return sum(weight.numel for weight in model.weights)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", FULL)
def test_published_models_have_the_parameters_that_were_published(name: str, tmp_path: Path) -> None:
    config, count = FULL[name]
    require(config)
    start = time.perf_counter()
    model = read_model(write_config(tmp_path, config), build)
    assert total(model) == count
    assert model.counted.startswith(f"transformers {transformers.__version__} as ")
    assert time.perf_counter() - start < 30, "nothing of it may be made for real"


def require(config: dict[str, Any]) -> None:
    """Skip what this release cannot make for real either."""
    small = next(
        tiny for tiny in TINY.values() if tiny["architectures"] == config.get("architectures", ["LlamaModel"])
    )
    try:
        made(small)
    except (AttributeError, TypeError, AssertionError) as error:
        pytest.skip(f"transformers {transformers.__version__} does not make it: {error}")


def made(config: dict[str, Any]) -> Any:
    """Weights and all."""
    settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    return getattr(transformers, config["architectures"][0])(settings)


@pytest.mark.parametrize("name", TINY)
def test_what_is_made_for_real_is_what_is_counted(name: str, tmp_path: Path) -> None:
    """From its config alone, from its saved folder, and from headers alone, without transformers: as it saves
    them, and with every tied weight and buffer stored too."""
    require(TINY[name])
    model = made(TINY[name])
    right = sum(param.numel() for param in model.parameters())
    frozen = sum(param.numel() for param in model.parameters() if not param.requires_grad)
    found = read_model(write_config(tmp_path, TINY[name]), build)
    assert total(found) == right
    assert sum(weight.numel for weight in found.weights if not weight.trained) == frozen
    model.save_pretrained(tmp_path)
    assert total(read_model(tmp_path, build)) == right
    assert total(read_model(tmp_path)) == right
    tensors = model.state_dict() | dict(model.named_buffers())
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    assert total(read_model(tmp_path, build)) == right
    assert total(read_model(tmp_path)) == right


def test_positions_that_whisper_freezes_are_not_trained() -> None:
    frozen = [weight for weight in build(TINY["whisper"], "F32").weights if not weight.trained]
    assert [weight.name for weight in frozen] == ["model.encoder.embed_positions.weight"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "qwen3_moe", "mixtral"])
def test_adapters_are_those_that_peft_makes_of_all_linear(name: str) -> None:
    """Embeddings are matrices too, T5's of relative positions under a name of the attention's; experts lie in
    stacks since transformers 5."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made(TINY[name]), peft.LoraConfig(target_modules="all-linear", r=2))
    right = sum(param.numel() for param in model.parameters() if param.requires_grad)
    found = tensors(build(TINY[name], "F32").weights, Run(rank=2, targets="all-linear"))
    assert sum(tensor.numel() for tensor in found if tensor.requires_grad) == right


CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); from transformers import *"


def test_code_of_the_models_own_is_never_run(tmp_path: Path) -> None:
    """Not of a type that nobody knows, nor of one that has code of its own beside transformers'."""
    (tmp_path / "modeling_own.py").write_text(CODE)
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    known = {**TINY["llama"], "auto_map": own}
    assert "LlamaForCausalLM" in read_model(write_config(tmp_path, known), build).counted
    with pytest.raises(ModelFileError, match=r"does not know model_type 'own'\): put its safetensors"):
        read_model(write_config(tmp_path, {**known, "model_type": "own"}), build)
    assert not (tmp_path / "ran").exists()


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"model_type": "own"}, "does not know model_type 'own'"),
    "no type": ({"model_type": None}, "does not know model_type None"),
    "class": ({"architectures": ["LlamaForEverything"]}, "has no class 'LlamaForEverything'"),
    "no class": ({"architectures": ["__version__"]}, "has no class '__version__'"),
    "another's class": ({"architectures": ["GPT2LMHeadModel"]}, "makes no GPT2LMHeadModel of model_type"),
    "numbers that do not fit": ({"num_attention_heads": 0}, "cannot build it: "),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_built_is_said(case: str, tmp_path: Path) -> None:
    """And the files' headers, which say less, are counted."""
    change, message = UNKNOWN[case]
    with pytest.raises(CannotBuildError, match=message):
        build({**TINY["llama"], **change}, "BF16")
    made(TINY["llama"]).save_pretrained(tmp_path)
    model = read_model(write_config(tmp_path, {**TINY["llama"], **change}), build)
    assert model.counted.startswith("headers of its files (transformers ")
    assert message in model.counted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"hidden_size": -5}, "hidden_size=-5"),
        ({"num_labels": 10**12}, "num_labels=1000000000000"),
        ({"text_config": {"num_layers": 10**9}}, "num_layers=1000000000"),
        ({"vision_config": {"depth": 10**9}}, "depth=1000000000"),
        ({"depths": [2, 10**9]}, r"depths=\[2, 1000000000\]"),
    ],
)
def test_absurd_sizes_are_refused_before_anybody_builds_them(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=f"config.json says {message}: it must be"):
        read_model(write_config(tmp_path, {**TINY["llama"], **change}), build)


@pytest.mark.parametrize("kind", ["llama", "clip", "t5", "gpt2", "vit", "resnet", "whisper"])
def test_sizes_that_a_config_leaves_out_are_the_defaults_and_that_is_said(kind: str, tmp_path: Path) -> None:
    whole = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    right = build(whole, "F32")
    model = read_model(write_config(tmp_path, {"model_type": kind}), build)
    assert total(model) == sum(weight.numel for weight in right.weights)
    assert ", by its defaults" in model.counted
    assert "defaults" not in right.by


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "vocab_size alone": (
        {"model_type": "llama", "vocab_size": 320},
        "(hidden_size 4,096, num_hidden_layers 32)",
    ),
    "other names": ({"model_type": "gpt2", "n_embd": 96}, "(num_hidden_layers 12, vocab_size 50,257)"),
    "of a part": (
        {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "text_config": {"model_type": "llama", "vocab_size": 320},
        },
        "(hidden_size 4,096, num_hidden_layers 32)",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_of_some_sizes_too(case: str, tmp_path: Path) -> None:
    config, said = PARTS[case]
    assert read_model(write_config(tmp_path, config), build).counted.endswith(f", by its defaults {said}")


def test_defaults_count_beside_files_only_if_the_files_agree(tmp_path: Path) -> None:
    """transformers leaves defaults out of the parts of a config that it saves."""
    tiny = made(TINY["gpt2"])
    tiny.save_pretrained(tmp_path)
    model = read_model(write_config(tmp_path, {"model_type": "gpt2"}), build)
    assert total(model) == sum(param.numel() for param in tiny.parameters())
    assert "headers of its files (config.json names no sizes, and what transformers" in model.counted
    shapes = {weight.name: weight.shape for weight in build({"model_type": "gpt2"}, "F32").weights}
    write_model(tmp_path / "model.safetensors", shapes, "F32")
    model = read_model(tmp_path, build)
    assert model.counted.startswith("transformers ")
    assert model.dimensions is not None


def test_a_gguf_file_is_no_model_of_default_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelFileError, match="GGUF, a format of"):
        read_model(write_config(tmp_path, {"model_type": "llama"}), build)


def test_nothing_of_the_process_is_left_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    before = (constants.HF_HUB_OFFLINE, sys.stdout, logging.root.manager.disable, torch.get_default_dtype())
    build(TINY["llama"], "BF16")
    after = (constants.HF_HUB_OFFLINE, sys.stdout, logging.root.manager.disable, torch.get_default_dtype())
    assert after == before
    assert capsys.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CannotBuildError, match="transformers is not installed"):
        build(TINY["llama"], "BF16")
