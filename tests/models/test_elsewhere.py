"""What people name instead of a model: each is told what it is, and what to name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adamw_triton.models import ModelFileError, read_model
from tests.models.files import write_model
from tests.models.test_headers import write_sharded
from tests.models.test_model import SMALL

CONFIG = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}
WHOLE = 16 * 8 + 8 + 4 * 8 * 8 + 3 * 8 * 8 + 2 * 8

FILES = {
    "model.Q4_K_M.gguf": "is GGUF, a format of llama.cpp for running models: name the folder of the original",
    "pytorch_model.bin": "is a pickle of PyTorch, which is not opened: name a folder with the model's",
    "consolidated.00.pth": "is a pickle of PyTorch",
    "last.ckpt": "is a pickle of PyTorch",
    "pytorch_model.bin.index.json": "is an index of pickles",
    "tf_model.h5": "is weights for another library",
    "model.onnx": "is weights for another library",
    "adapter_config.json": "is of a PEFT adapter: name the folder of its base model, and --lora",
    "adapter_model.safetensors": "is of a PEFT adapter",
    "model-00001-of-00004.safetensors": "is one file of several: name its folder, or its index",
    "generation_config.json": "is not a model's config.json: it names no model_type",
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ModelFileError) as refusal:
        read_model(tmp_path / name)
    assert FILES[name] in str(refusal.value)
    assert name in str(refusal.value)


FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({}, "has neither safetensors files nor a config.json: it is empty"),
    "other files": ({"README.md": 1}, r"has neither safetensors files nor a config.json$"),
    "pickles": ({"pytorch_model.bin": 1}, "has 'pytorch_model.bin', a pickle of PyTorch"),
    "Meta's": (
        {"consolidated.00.pth": 1, "params.json": {}},
        "has 'consolidated.00.pth', a pickle of PyTorch",
    ),
    "GGUF": ({"a.gguf": 1}, "has 'a.gguf', GGUF, a format of llama.cpp"),
    "GGUF and a config": ({"a.gguf": 1, "config.json": {"model_type": "llama"}}, "has 'a.gguf', GGUF"),
    "GGUF and a whole config": ({"a.gguf": 1, "config.json": CONFIG}, "has 'a.gguf', GGUF"),
    "an adapter": ({"adapter_config.json": {}, "adapter_model.safetensors": 1}, "holds a PEFT adapter"),
    "diffusers": ({"model_index.json": {}}, "is a pipeline of diffusers: name the folder of one of its"),
    "a cache": ({"snapshots/1/config.json": CONFIG}, "is a cache of the Hugging Face Hub: name a folder in"),
    "an index alone": (
        {"model.safetensors.index.json": {"weight_map": {"a": "1.safetensors"}}},
        "lists '1.safetensors', which is not there: is the download complete",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_no_model(case: str, tmp_path: Path) -> None:
    held, message = FOLDERS[case]
    for name, content in held.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match=message):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "beside",
    [
        [],
        ["pytorch_model.bin"],
        ["flax_model.msgpack", "tf_model.h5"],
        ["model.safetensors.index.json"],
    ],
)
def test_a_config_is_enough_whatever_lies_beside_it(beside: list[str], tmp_path: Path) -> None:
    """Pickles are not opened; of an index whose files were not downloaded the config knows as much."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in beside:
        (tmp_path / name).write_text('{"weight_map": {"a": "1.safetensors"}}')
    assert sum(weight.numel for weight in read_model(tmp_path).weights) == WHOLE


def test_an_index_can_be_named_itself(tmp_path: Path) -> None:
    index = write_sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = read_model(index)
    assert (model.name, model.weights) == (tmp_path.name, read_model(tmp_path).weights)
    assert model.dimensions is not None


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelFileError, match="is a pointer of Git LFS and not the file itself: git lfs pull"):
        read_model(tmp_path)


def test_a_name_on_the_hub_is_told_how_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFileError) as refusal:
        read_model(Path("meta-llama/Llama-3.2-3B"))
    assert "hf download meta-llama/Llama-3.2-3B config.json --local-dir Llama-3.2-3B" in str(refusal.value)
    with pytest.raises(ModelFileError) as refusal:
        read_model(Path("/no/such/folder"))
    assert "hf download" not in str(refusal.value)


def test_a_part_of_a_folder_is_counted_as_it_lies(tmp_path: Path) -> None:
    """Somebody named that file, and not the model."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = write_model(tmp_path / "vision.safetensors", {"a": (4, 4)})
    assert sum(weight.numel for weight in read_model(path).weights) == 16
