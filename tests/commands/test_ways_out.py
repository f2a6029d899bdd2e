"""What `adamw-triton plan` advises when it refuses is followed, word by word: it must work."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from adamw_triton.cli import main
from tests.models.files import write_model
from tests.models.test_headers import write_sharded
from tests.models.test_quantized import FORMATS, LLAMA, NF4, write_folder

GPU = ("--gpu", "24GiB", "--host-memory", "64GiB")
LORA, BASE = ("--lora", "8"), ("--quantized-base", "4")
OWN = {"model_type": "own", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
WEIGHTS = {"model.embed_tokens.weight": (320, 64), "model.layers.0.self_attn.q_proj.weight": (64, 64)}

Arguments = tuple[str, ...]
Way = Callable[[Path, Arguments], Arguments]
"""What is done in the folder, and the arguments afterwards."""


def config(path: Path, **change: Any) -> None:
    said = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in said.items() if value is not None})
    )


def give(*options: str) -> Way:
    return lambda path, arguments: (*arguments, *options)


def instead(*options: str) -> Way:
    """Of the model."""
    return lambda path, arguments: (*options, *arguments[1:])


def correct(**change: Any) -> Way:
    """None: the key is removed."""

    def way(path: Path, arguments: Arguments) -> Arguments:
        config(path, **change)
        return arguments

    return way


def put_files(path: Path, arguments: Arguments) -> Arguments:
    write_model(path / "model.safetensors", WEIGHTS)
    return arguments


def put_config(path: Path, arguments: Arguments) -> Arguments:
    (path / "config.json").write_text(json.dumps(LLAMA))
    return (*arguments, *LORA, *BASE)


def name_original(path: Path, arguments: Arguments) -> Arguments:
    """A folder of the model in 16 or 32 bits."""
    (path / "original").mkdir(exist_ok=True)
    (path / "original" / "config.json").write_text(json.dumps(LLAMA))
    return (str(path / "original"), *arguments[1:])


def name_beside(name: str) -> Way:
    return lambda path, arguments: (str(path / name), *arguments[1:])


class Case(NamedTuple):
    files: Callable[[Path], object]
    options: Arguments
    ways: dict[str, Way]
    """By the words that advise it."""
    name: str = ""
    """Of the file, if it is not the folder that is named."""
    without: bool | None = None
    """Whether transformers is there; None: either way."""


def only(said: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: write_folder(path, said, None)


NOWHERE: dict[str, Way] = {
    "put its safetensors files beside it": put_files,
    "give --params": instead("--params", "1.5B"),
}
ARCHITECTURES: dict[str, Way] = {
    "correct or remove its architectures": correct(architectures=["LlamaForCausalLM"]),
    "or remove its architectures": correct(architectures=None),
}
INSTALL: dict[str, Way] = {"install transformers": give()}
CASES = {
    f"{name}, {told}": Case(
        lambda path, name=name, told=told: write_folder(
            path,
            {**LLAMA, "quantization_config": FORMATS[name][1]},
            FORMATS[name][0] if told == "files" else None,
        ),
        (),
        {
            "Give --lora RANK --quantized-base 4": give(*LORA, *BASE),
            "or name a folder of the model in 16 or 32 bits": name_original,
        },
    )
    for name in FORMATS
    for told in ("files", "config alone")
}
CASES |= {
    f"{name} without a config": Case(
        lambda path, name=name: write_folder(path, None, FORMATS[name][0] if name in FORMATS else NF4),
        (),
        {"put its config.json beside": put_config, "or name a folder of the model in 16": name_original},
    )
    for name in (*FORMATS, "NF4")
}
CASES |= {
    "adapters alone on codes": Case(
        only({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}),
        LORA,
        {"Give --lora RANK --quantized-base 4": give(*BASE)},
    ),
    "codes of a type that nobody knows": Case(
        lambda path: write_folder(path, OWN, FORMATS["GPTQ"][0]),
        (*LORA, *BASE),
        {"give --params": instead("--params", "1.5B")},
    ),
    "NF4": Case(
        lambda path: write_folder(path, LLAMA, NF4),
        (),
        {"give --lora RANK": give(*LORA), "or name a folder of the model in 16": name_original},
    ),
    "a type that nobody knows": Case(only(OWN), (), NOWHERE, without=False),
    "without sizes": Case(only({"model_type": "own"}), (), NOWHERE, without=False),
    "no type": Case(only({"model_type": None}), (), NOWHERE, without=False),
    "a class that is none": Case(only({**LLAMA, "architectures": ["Foo"]}), (), ARCHITECTURES | NOWHERE),
    "another's class": Case(
        only({**LLAMA, "architectures": ["GPT2LMHeadModel"]}), (), ARCHITECTURES | NOWHERE
    ),
    "a type of transformers": Case(only({"model_type": "gpt2"}), (), INSTALL | NOWHERE, without=True),
    "its class": Case(only({**LLAMA, "architectures": ["LlamaForMulti"]}), (), ARCHITECTURES, without=True),
    "its layers": Case(
        only({**LLAMA, "model_type": "qwen3_moe", "moe_intermediate_size": 64, "decoder_sparse_step": 2}),
        (),
        INSTALL | NOWHERE,
        without=True,
    ),
    "a size is missing": Case(
        only({key: value for key, value in LLAMA.items() if key != "hidden_size"}),
        (),
        {"add it": correct(hidden_size=64)} | INSTALL | NOWHERE,
        without=True,
    ),
    "a pickle": Case(
        lambda path: (path / "pytorch_model.bin").touch() or write_folder(path, LLAMA, None),
        (),
        {"name a folder with the model's config.json": name_beside(".")},
        name="pytorch_model.bin",
    ),
    "an adapter": Case(
        lambda path: (path / "adapter_config.json").write_text("{}"),
        (),
        {"name the folder of its base model, and --lora": lambda p, a: (*name_original(p, a), *LORA)},
    ),
    "a shard": Case(
        lambda path: write_sharded(path, {"a": "model-00001-of-00002.safetensors", "b": "2.safetensors"}),
        (),
        {"name its folder": name_beside("."), "or its index": name_beside("model.safetensors.index.json")},
        name="model-00001-of-00002.safetensors",
    ),
    "a pipeline": Case(
        lambda path: (
            (path / "model_index.json").write_text("{}"),
            (path / "unet").mkdir(),
            write_folder(path / "unet", {"_class_name": "UNet2DConditionModel"}, None),
            write_model(path / "unet" / "diffusion_pytorch_model.safetensors", WEIGHTS),
        ),
        (),
        {"name the folder of one of its models": name_beside("unet")},
    ),
    "a cache": Case(
        lambda path: (
            (path / "snapshots" / "1").mkdir(parents=True)
            or write_folder(path / "snapshots" / "1", LLAMA, None)
        ),
        (),
        {"name a folder in its snapshots": name_beside("snapshots/1")},
    ),
    "GGUF": Case(
        lambda path: (path / "a.gguf").touch(), (), {"name the folder of the original": name_original}
    ),
    "twice the same": Case(
        lambda path: [write_model(path / f"{name}.safetensors", WEIGHTS) for name in "ab"],
        (),
        {"name one of them": name_beside("a.safetensors")},
    ),
    "other floats": Case(
        lambda path: write_model(path / "model.safetensors", WEIGHTS, "F64"),
        (),
        {"give the --dtype to train in": give("--dtype", "bf16")},
    ),
    "a base without adapters": Case(only(LLAMA), BASE, {"--quantized-base needs --lora RANK": give(*LORA)}),
    "both": Case(
        only(LLAMA), ("--params", "7B"), {"one of them": lambda path, arguments: arguments[:1] + GPU}
    ),
    "adapters of a number": Case(
        only(LLAMA),
        ("--params", "100M", *LORA),
        {"name its folder or file": lambda path, arguments: (arguments[-1], *GPU, *LORA)},
        name="?",
    ),
    "a bare number": Case(
        only(LLAMA),
        ("--params", "1.5"),
        {"did you mean '1.5B'": lambda path, arguments: ("--params", "1.5B", *GPU)},
        name="?",
    ),
    "bytes": Case(
        only(LLAMA), ("--activations", "3"), {"write it like '24GiB'": give("--activations", "3GiB")}
    ),
    "a card": Case(only(LLAMA), ("--gpu", "T5"), {"did you mean 'T4'": give("--gpu", "T4")}),
    "several cards": Case(only(LLAMA), ("--gpu", "A100"), {"say 'A100-40GB'": give("--gpu", "A100-40GB")}),
}


def run(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["plan", *arguments])
    output = capsys.readouterr()
    return code, output.err


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("without", [False, True], ids=["with transformers", "without"])
def test_every_way_out_leads_out(
    case: str,
    without: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files, options, ways, name, only_without = CASES[case]
    if only_without not in (None, without):
        pytest.skip("it is no problem then, or has other ways")
    if without:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        pytest.importorskip("transformers")
    for advice, way in ways.items():
        path = tmp_path / "model"
        path.mkdir()
        files(path)
        arguments = (str(path / name), *GPU, *options)
        if name == "?":  # the model is a number
            arguments = (*options, *GPU)
        code, refusal = run(arguments, capsys)
        assert code == 2
        assert advice in refusal
        assert refusal.count("\n") == 1
        assert without or "install transformers" not in refusal.lower()
        if advice.startswith("install"):
            monkeypatch.delitem(sys.modules, "transformers")
            importlib.import_module("transformers")
        followed = (*arguments, str(path)) if "folder or file" in advice else arguments
        code, refusal = run(way(path, followed), capsys)
        assert code != 2, refusal
        if without:
            monkeypatch.setitem(sys.modules, "transformers", None)
        shutil.rmtree(path)
