"""``adamw-triton convert --to master``: the exact weights of a Trainer's checkpoint folder."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adamw_triton import AdamW
from adamw_triton.checkpoint import exporting, model_files
from adamw_triton.checkpoint.files import CheckpointError
from adamw_triton.cli import main
from adamw_triton.models.architecture import CannotBuildError
from tests.checkpoint.crash import IN_MEMORY
from tests.checkpoint.test_masters import HALVES, Tied, equal, optimizer_of
from tests.measuring import printed
from tests.optimizer.problems import train

KINDS = ("safetensors", "shards", "bin", "bin shards")


def unknown(config: Mapping[str, Any]) -> list[list[list[str]]]:
    raise CannotBuildError("nobody was asked")


def save_weights(weights: dict[str, Tensor], folder: Path, kind: str = "safetensors") -> None:
    """As transformers does."""
    suffix, stem = ("bin", "pytorch_model") if "bin" in kind else ("safetensors", "model")
    shards = [weights]
    if "shards" in kind:
        names = sorted(weights)
        shards = [{name: weights[name] for name in part} for part in (names[:2], names[2:])]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        of = f"-{number:05}-of-{len(shards):05}" if "shards" in kind else ""
        file = folder / f"{stem}{of}.{suffix}"
        weight_map.update(dict.fromkeys(shard, file.name))
        if suffix == "bin":
            torch.save(shard, file)
        else:
            save_file({name: value.clone() for name, value in shard.items()}, file)
    if "shards" in kind:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save(
    model: nn.Module, optimizer: AdamW, folder: Path, kind: str = "safetensors", without: str = ""
) -> None:
    weights = {name: value for name, value in model.state_dict().items() if name != without}
    save_weights(weights, folder, kind)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def named_optimizer(model: nn.Module, variant: str = "32bit", prefix: str = "") -> AdamW:
    named = [(prefix + name, p) for name, p in model.named_parameters() if p.requires_grad]
    return AdamW(named, lr=1e-5, variant=variant, master_weights=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint-3").mkdir()
    return tmp_path / "checkpoint-3"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", ["32bit", "paged_8bit"])
def test_it_is_the_master_state_dict(variant: str, dtype: torch.dtype, kind: str, folder: Path) -> None:
    model = Tied(dtype)
    optimizer = named_optimizer(model, variant)
    train(optimizer, 3)
    save(model, optimizer, folder, kind, without="" if kind == "bin" else "head.weight")
    out = folder / "master.safetensors"
    assert main(["convert", str(folder), str(out), "--to", "master"]) == 0
    found, wanted = load_file(out), optimizer.master_state_dict(model)
    if kind != "bin":
        del wanted["head.weight"]
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype is value.dtype
        assert torch.equal(found[name], value), name
    other = Tied(dtype, seed=1)
    resumed = optimizer_of(other, variant)
    resumed.load_master_state_dict(other, found)
    equal(resumed.master_state_dict(other), optimizer.master_state_dict(model))
    with out.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        assert length % 8 == 0
        assert json.loads(file.read(length))["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_have_changed(prefix: str, folder: Path) -> None:
    model = Tied(torch.bfloat16)
    optimizer = named_optimizer(model, prefix=prefix)
    train(optimizer, 2)
    save(model, optimizer, folder)
    exporting.export(folder, folder / "out.safetensors", unknown)
    assert torch.equal(
        load_file(folder / "out.safetensors")["hidden.weight"], optimizer.master_weight(model.hidden.weight)
    )


def test_states_by_name(folder: Path) -> None:
    """As torch.distributed.checkpoint gathers them."""
    model = Tied(torch.bfloat16)
    optimizer = named_optimizer(model)
    train(optimizer, 2)
    save(model, optimizer, folder)
    state_dict = optimizer.state_dict()
    names = state_dict["param_groups"][0].pop("param_names")
    state_dict["state"] = {names[key]: entry for key, entry in state_dict["state"].items()}
    state_dict["param_groups"][0]["params"] = names
    torch.save(state_dict, folder / "optimizer.pt")
    exporting.export(folder, folder / "out.safetensors", unknown)
    assert torch.equal(
        load_file(folder / "out.safetensors")["hidden.weight"], optimizer.master_weight(model.hidden.weight)
    )


def test_what_was_never_stepped(folder: Path) -> None:
    model = Tied(torch.bfloat16)
    optimizer = named_optimizer(model)
    model.hidden.bias.grad = torch.ones(64, dtype=torch.bfloat16)
    optimizer.step()
    save(model, optimizer, folder, "bin")
    exporting.export(folder, folder / "out.safetensors", unknown)
    found, wanted = load_file(folder / "out.safetensors"), optimizer.master_state_dict(model)
    assert all(
        found[name].dtype is value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


def test_other_memory_orders_and_odd_tensors(folder: Path) -> None:
    """The file holds them in its own."""
    weight = nn.Parameter(torch.randn(8, 16, 3, 3).to(torch.bfloat16, memory_format=torch.channels_last))
    scalar, empty = nn.Parameter(torch.tensor(1.5).bfloat16()), nn.Parameter(torch.zeros(0, 3).bfloat16())
    model = nn.ParameterDict({"weight": weight, "scalar": scalar, "empty": empty})
    model.register_buffer("flags", torch.tensor([True, False, True]))
    optimizer = named_optimizer(model, "8bit")
    train(optimizer, 2)
    save_weights({name: value.contiguous() for name, value in model.state_dict().items()}, folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    exporting.export(folder, folder / "out.safetensors", unknown)
    equal(
        dict(sorted(optimizer.master_state_dict(model).items())),
        dict(sorted(load_file(folder / "out.safetensors").items())),
    )


# --- Without names: by the order that the architecture tells ----------------------------------------------


def groups_of(model: Tied) -> list[list[str]]:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return [
        [n for n in names if "bias" not in n and "norm" not in n],
        [n for n in names if "bias" in n or "norm" in n],
    ]


def nameless(model: Tied, groups: list[list[str]]) -> AdamW:
    params = dict(model.named_parameters())
    return AdamW(
        [{"params": [params[name] for name in names]} for names in groups],
        lr=1e-5,
        variant="8bit",
        master_weights=True,
    )


@pytest.mark.parametrize("split", [True, False])
def test_by_the_architectures_order(split: bool, folder: Path) -> None:
    model = Tied(torch.bfloat16)
    decayed, spared = groups_of(model)
    whole = [[name for name, p in model.named_parameters() if p.requires_grad], []]
    optimizer = nameless(model, [decayed, spared] if split else whole)
    train(optimizer, 2)
    save(model, optimizer, folder, without="head.weight")
    (folder / "config.json").write_text('{"model_type": "tied"}')
    asked = []

    def orders(config: Mapping[str, Any]) -> list[list[list[str]]]:
        asked.append(config)
        return [whole, [decayed, spared]]

    exporting.export(folder, folder / "out.safetensors", orders)
    assert asked == [{"model_type": "tied"}]
    found, wanted = load_file(folder / "out.safetensors"), optimizer.master_state_dict(model)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


ADVICE = (
    r"master_state_dict\(model\); an optimizer that is given model\.named_parameters\(\) leaves the names"
)


@pytest.mark.parametrize("wrong", ["counts", "shapes", "no config", "unknown"])
def test_where_the_order_cannot_be_known(wrong: str, folder: Path) -> None:
    model = Tied(torch.bfloat16)
    decayed, spared = groups_of(model)
    optimizer = nameless(model, [decayed, spared])
    train(optimizer, 1)
    save(model, optimizer, folder)
    if wrong != "no config":
        (folder / "config.json").write_text("{}")
    ways: dict[str, list[list[list[str]]]] = {
        "counts": [[decayed[:-1], spared], [[*decayed, *spared]]],
        "shapes": [[decayed[::-1], spared]],
        "no config": [[decayed, spared]],
        "unknown": [],
    }
    said = {
        "counts": r"the optimizer has groups of \[2, 3\] parameters, .* \[1, 3\] or \[5\]",
        "shapes": r"'hidden\.weight' has shape \(64, 64\), its state in optimizer\.pt \(100, 64\)",
        "no config": "there is no config.json that tells the architecture",
        "unknown": "nobody was asked",
    }
    orders = unknown if wrong == "unknown" else lambda config: ways[wrong]
    with pytest.raises(CheckpointError, match=f"cannot be known: {said[wrong]}.*{ADVICE}"):
        exporting.export(folder, folder / "out.safetensors", orders)


# --- Refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def good(folder: Path) -> tuple[Tied, AdamW]:
    model = Tied(torch.bfloat16)
    optimizer = named_optimizer(model)
    train(optimizer, 1)
    save(model, optimizer, folder)
    return model, optimizer


def refused(folder: Path, capsys: pytest.CaptureFixture[str], out: str = "out.safetensors") -> str:
    """What is said, in a line; nothing is left behind."""
    before = sorted(os.listdir(folder)) if folder.is_dir() else []
    assert main(["convert", str(folder), str(folder.parent / out), "--force", "--to", "master"]) == 2
    assert (sorted(os.listdir(folder)) if folder.is_dir() else []) == before
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("adamw-triton convert: ")]
    assert len(said) == 1, error
    return said[0]


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("model.safetensors", "has no weights: neither model.safetensors nor pytorch_model.bin"),
        ("optimizer.pt", "has no optimizer.pt, where exact weights have their other half"),
    ],
)
def test_half_a_folder(
    good: object, remove: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / remove).unlink()
    assert message in refused(folder, capsys)


def test_other_things_than_a_checkpoint(
    good: object, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is a file: name a Trainer's checkpoint folder" in refused(folder / "optimizer.pt", capsys)
    assert "is not there: name a Trainer's checkpoint folder" in refused(folder / "no", capsys)
    assert "name one of its folders, checkpoint-3 say" in refused(folder.parent, capsys)
    for out in ("out.pt", "out", "checkpoint-3"):
        assert "is no name of a .safetensors file" in refused(folder, capsys, out)
    assert "there is no folder" in refused(folder, capsys, "no/out.safetensors")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "holds a PEFT adapter" in refused(folder, capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_file(good: object, name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{name} is cut short, damaged or no checkpoint" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "lists what is no file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
    ],
)
def test_a_damaged_index(
    good: object, index: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert message in refused(folder, capsys)


def test_nothing_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype, master in ((torch.bfloat16, False), (torch.float32, True)):
        model = Tied(dtype)
        optimizer = optimizer_of(model, master_weights=master)
        train(optimizer, 1)
        save(model, optimizer, folder)
        said = refused(folder, capsys)
        assert "keeps no exact weights" in said
        assert "those in model.safetensors are all there is" in said


def test_weights_of_another_run(
    good: tuple[Tied, AdamW], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = good
    weights = model.state_dict()
    for change, message in (
        (
            {"hidden.weight": weights["hidden.weight"].float()},
            "'hidden.weight' of model.safetensors has dtype torch.float32",
        ),
        ({"hidden.weight": weights["hidden.weight"].half()}, "keeps what goes with another (remainder)"),
        ({"hidden.weight": weights["hidden.weight"][:2]}, "'hidden.weight' has shape (2, 64), its state"),
        ({"hidden.weight": None}, "there is no weight 'hidden.weight'"),
    ):
        changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
        save_weights(changed, folder)
        assert message in refused(folder, capsys)


def test_a_failed_write_leaves_the_old_file(
    good: object, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out.safetensors"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.halves, "read", full)
    assert "No space left" in refused(folder, capsys)
    assert out.read_text() == "old"
    assert sorted(os.listdir(folder.parent)) == ["checkpoint-3", "out.safetensors"]


def test_a_dtype_without_a_name(tmp_path: Path) -> None:
    pieces = {"a": model_files.Pieces(torch.complex128, torch.Size([1]), list)}
    with pytest.raises(
        CheckpointError, match=r"'a' is of torch\.complex128, which a safetensors file cannot"
    ):
        model_files.save(pieces, tmp_path / "out.safetensors", iter)


# --- Memory -----------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import safetensors.torch
from adamw_triton.checkpoint import exporting

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) << 10

def track(names):
    global highest
    for name in names:
        yield name
        highest = max(highest, anonymous())

folder, target, small = map(Path, sys.argv[1:4])
exporting.export(small, target, None)  # imports of torch's own
before, highest = anonymous(), 0
exporting.export(folder, target, None, track)
print(max(highest, anonymous()) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_checkpoint(kind: str) -> None:
    """But for the pages of the files, which the system takes back at need: 128 MiB of fp32 pass by, half of
    them in one tensor."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as name:
        folders = []
        for part in ("small", "large"):
            folders.append(Path(name, part))
            folders[-1].mkdir()
            numels = [5000] if part == "small" else [1 << 24, *[1 << 20] * 16]
            model = nn.ParameterList([torch.zeros(numel, dtype=torch.bfloat16) for numel in numels])
            optimizer = named_optimizer(model, "8bit")
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            save(model, optimizer, folders[-1], kind)
        small, large = folders
        target = Path(name, "out.safetensors")
        grown = int(printed(MEASURE, large, target, small))
        assert target.stat().st_size > 128 << 20
    assert grown < 24 << 20
