"""Folders, files and configs; the sizes of well-known models; how little of a large file is read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_triton.models import Dimensions, Model, ModelFileError, Weight, read_model
from adamw_triton.models.config import LIMITS
from adamw_triton.models.families import weights_of
from tests.models.files import write, write_model
from tests.models.test_headers import bytes_read, write_sharded

CONFIGS = Path(__file__).parent / "configs"

# As their model cards, or the metadata of their files, tell.
PARAMETERS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Phi-3-mini-4k": 3_821_079_552,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "gemma-2-2b": 2_614_341_888,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_well_known_models_have_the_parameters_that_they_are_known_for(name: str) -> None:
    model = read_model(CONFIGS / name)
    assert model.name == name
    assert sum(weight.numel for weight in model.weights) == PARAMETERS[name]
    assert {weight.dtype for weight in model.weights} == {"BF16" if name != "Llama-2-7B" else "F16"}


def test_a_config_can_be_named_itself() -> None:
    assert read_model(CONFIGS / "Llama-3.2-3B" / "config.json") == read_model(CONFIGS / "Llama-3.2-3B")


def test_dimensions() -> None:
    assert read_model(CONFIGS / "Llama-3.2-3B").dimensions == Dimensions(
        hidden=3072, layers=28, vocabulary=128256, intermediate=8192, query_width=3072, key_width=1024
    )
    assert read_model(CONFIGS / "gemma-2-2b").dimensions == Dimensions(
        hidden=2304, layers=26, vocabulary=256000, intermediate=9216, query_width=2048, key_width=1024
    )


SMALL = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "intermediate_size": 8,
    "num_attention_heads": 2,
}


def make_folder(
    path: Path, config: object | None, *shapes_by_file: tuple[str, dict[str, tuple[int, ...]]]
) -> Path:
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name, shapes in shapes_by_file:
        write_model(path / name, shapes)
    return path


def names_of(path: Path) -> list[str]:
    return sorted(weight.name for weight in read_model(path).weights)


def test_files_of_weights_come_before_the_config(tmp_path: Path) -> None:
    """They are what will be trained; the config still tells the dimensions, of a single file too."""
    make_folder(tmp_path, SMALL, ("model.safetensors", {"a": (2, 2)}), ("optimizer.safetensors", {"b": (2,)}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert read_model(path).weights == [Weight("a", (2, 2), "BF16")]
        assert read_model(path).dimensions == Dimensions(8, 1, 16, 8, 8, 8)


def test_an_index_comes_before_single_files(tmp_path: Path) -> None:
    make_folder(tmp_path, None, ("consolidated.safetensors", {"z": (2,)}))
    write_sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert names_of(tmp_path) == ["a", "b"]
    assert read_model(tmp_path).dimensions is None


def test_several_files_without_an_index_are_one_model(tmp_path: Path) -> None:
    make_folder(tmp_path, None, ("x.safetensors", {"a": (2,)}), ("y.safetensors", {"b": (2,)}))
    assert names_of(tmp_path) == ["a", "b"]
    make_folder(tmp_path, None, ("z.safetensors", {"b": (2,)}))
    with pytest.raises(ModelFileError, match="several safetensors files with the same tensors"):
        read_model(tmp_path)


def test_what_is_no_model(tmp_path: Path) -> None:
    for path, message in {
        tmp_path: "has neither safetensors files nor a config.json",
        tmp_path
        / "gone": "there is no file or folder .*gone'; a model of the Hugging Face Hub must be downloaded",
        Path("x" * 5000): "cannot read x+: File name too long",
    }.items():
        with pytest.raises(ModelFileError, match=message):
            read_model(path)
    write(tmp_path / "model.safetensors", {}, 0)
    with pytest.raises(ModelFileError, match="has no tensors"):
        read_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="holds a PEFT adapter: name the folder of its base model"):
        read_model(tmp_path)


TEXTS = {
    "not JSON": ("{", "config.json is not valid JSON: Expecting"),
    "an array": ("[1]", "config.json is not a JSON object but list"),
    "deep": ("[" * 100_000, "it nests too deeply"),
    "empty": ("", "config.json is not valid JSON"),
    "binary": ("\0\1\2", "config.json is not valid JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_configs_that_are_not_json(case: str, tmp_path: Path) -> None:
    """Also where the weights are there: somebody broke it."""
    text, message = TEXTS[case]
    (tmp_path / "config.json").write_text(text)
    for _ in range(2):
        with pytest.raises(ModelFileError, match=message):
            read_model(tmp_path)
        write_model(tmp_path / "model.safetensors", {"a": (2,)})


ABSURD: list[object] = [0, -1, 1.5, True, "8", [8], {}, 1 << 70, float("inf")]


@pytest.mark.parametrize("value", ABSURD, ids=repr)
@pytest.mark.parametrize("key", [*SMALL][1:])
def test_absurd_sizes_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ModelFileError, match=f"^config.json says {key}=.*: it must be a whole number, 1 to "):
        weights_of({**SMALL, key: value}, "BF16")


@pytest.mark.parametrize("key", [*SMALL][1:])
def test_missing_sizes_are_refused_by_name(key: str) -> None:
    with pytest.raises(ModelFileError, match=f"config.json does not say {key}"):
        weights_of({name: value for name, value in SMALL.items() if name != key}, "BF16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "model_type None cannot be told"),
        ({"model_type": ["llama"]}, "cannot be told"),
        ({"num_attention_heads": 9}, "num_attention_heads=9, more than hidden_size=8"),
    ],
)
def test_configs_that_do_not_tell_the_weights(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=message):
        read_model(make_folder(tmp_path, {**SMALL, **change}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 40) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*SMALL, "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
keys = st.sampled_from([*SMALL, *LIMITS, "text_config", "dtype", "torch_dtype", "attention_bias", "n_embd"])


@given(st.dictionaries(keys, json_values, max_size=4))
def test_any_config_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps({**SMALL, **change}))
    try:
        found: object = read_model(path)
    except ModelFileError as error:
        found = error
    if isinstance(found, Model):
        assert all(weight.numel > 0 for weight in found.weights)
    else:
        assert len(str(found).splitlines()) == 1


def test_a_multimodal_model_has_the_dimensions_of_its_language_model(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": SMALL}
    make_folder(tmp_path, config)
    with pytest.raises(ModelFileError, match="model_type 'gemma3' cannot be told"):
        read_model(tmp_path)
    make_folder(tmp_path, config, ("model.safetensors", {"a": (2,)}))
    assert read_model(tmp_path).dimensions == Dimensions(8, 1, 16, 8, 8, 8)


def test_experts_count_as_often_as_a_token_visits_them(tmp_path: Path) -> None:
    config = {**SMALL, "moe_intermediate_size": 4, "num_experts_per_tok": 3}
    model = read_model(make_folder(tmp_path, config, ("model.safetensors", {"a": (2,)})))
    assert model.dimensions is not None
    assert model.dimensions.intermediate == 12


# Large models


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {weight.name: weight.shape for weight in read_model(CONFIGS / name).weights}


def read_and_measured(path: Path) -> tuple[list[Weight], float, int]:
    """The weights, the seconds it took and the bytes that were read."""
    bytes_before, start = bytes_read(), time.perf_counter()
    weights = list(read_model(path).weights)
    return weights, time.perf_counter() - start, bytes_read() - bytes_before


def test_a_file_of_141_gb_is_read_in_no_time(tmp_path: Path) -> None:
    """The goal is a second and 10 MB for the whole command; this is its part."""
    path = write_model(tmp_path / "model.safetensors", shapes_of("Llama-3.1-70B"))
    assert path.stat().st_size > 141e9
    weights, seconds, count = read_and_measured(path)
    assert {weight.name: weight.shape for weight in weights} == shapes_of("Llama-3.1-70B")
    assert seconds < 0.5
    assert count < 200_000


def test_thirty_shards_are_read_in_no_time(tmp_path: Path) -> None:
    shapes = shapes_of("Llama-3.1-70B")
    table = {name: f"model-{number % 30:05}.safetensors" for number, name in enumerate(shapes)}
    for file in set(table.values()):
        write_model(tmp_path / file, {name: shape for name, shape in shapes.items() if table[name] == file})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    weights, seconds, count = read_and_measured(tmp_path)
    assert {weight.name: weight.shape for weight in weights} == shapes
    assert seconds < 0.5
    assert count < 400_000
