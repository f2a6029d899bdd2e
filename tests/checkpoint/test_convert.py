"""``adamw-triton convert``: every form into every other, damaged files, what is left behind."""

from __future__ import annotations

import copy
import fractions
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.checkpoint import files
from adamw_triton.checkpoint.conversion import FORMS, convert
from adamw_triton.cli import main
from adamw_triton.installing import missing
from tests.checkpoint import release_0
from tests.checkpoint.crash import IN_MEMORY
from tests.checkpoint.sources import HYPER, SOURCES, meaning, trained
from tests.measuring import printed
from tests.optimizer.problems import bits, parameters, state_bits, train

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = ("pt", "safetensors")


def copies(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_into_every_form(source: str, to: str, suffix: str, tmp_path: Path) -> None:
    params, optimizer = trained(source)
    expected = meaning(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "in.pt")
    out = tmp_path / f"out.{suffix}"
    assert main(["convert", str(tmp_path / "in.pt"), str(out), "--to", to]) == 0
    state_dict = files.load(out)
    coded = to == "native" and source in ("bitsandbytes 8-bit", "torchao 8-bit")
    for (step, *moments), exact in zip(release_0.read(state_dict), expected, strict=True):
        assert step == 20
        for moment, wanted in zip(moments, exact, strict=True):
            if coded and moment.numel() >= 4096:
                assert (moment - wanted).norm() <= 0.03 * wanted.norm()
            else:
                torch.testing.assert_close(moment, wanted, rtol=1e-6, atol=0)
    loads = AdamW(copies(params), variant="8bit")
    loads.load_state_dict(state_dict)
    assert loads.param_groups[0]["lr"] == pytest.approx(HYPER["lr"], rel=1e-7)
    assert loads.param_groups[0]["betas"] == HYPER["betas"]
    if source == "ours 8bit" and to == "native":
        assert state_bits(loads) == state_bits(optimizer)
    if to == "torch":
        torchs = torch.optim.AdamW(copies(params))
        assert set(state_dict["param_groups"][0]) == set(torchs.state_dict()["param_groups"][0])
        assert state_dict["param_groups"][0]["decoupled_weight_decay"] is True
        torchs.load_state_dict(state_dict)
        train(torchs, 1, first=21)


def test_there_and_back_is_exact(tmp_path: Path) -> None:
    """Through both kinds of file, with names, a learning rate in a tensor and blocks in another order."""
    params = [*parameters(), Parameter(torch.randn(8, 16, 8, 8).to(memory_format=torch.channels_last))]
    named = [(f"layer.{index}", param) for index, param in enumerate(params)]
    optimizer = AdamW([{"params": named[:2], "lr": torch.tensor(0.5)}, {"params": named[2:]}], variant="8bit")
    train(optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", "native")
    convert(tmp_path / "b.safetensors", tmp_path / "c.pt", "native")
    twins = [(name, Parameter(p.detach().clone())) for name, p in named]
    back = AdamW([{"params": twins[:2]}, {"params": twins[2:]}], variant="8bit")
    back.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    assert state_bits(back) == state_bits(optimizer)
    assert [group["lr"] for group in back.param_groups] == [0.5, 1e-3]
    assert [group["param_names"] for group in back.param_groups] == [
        group["param_names"] for group in optimizer.param_groups
    ]


def test_a_safetensors_file_is_what_others_expect(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    optimizer = AdamW(parameters(), variant="8bit")
    train(optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.safetensors", "native")
    tensors = load_file(tmp_path / "out.safetensors")
    first = next(iter(optimizer.state.values()))
    assert bits([tensors["0.exp_avg_codes"]]) == bits([first["exp_avg_codes"]])
    assert float(tensors["0.step"]) == 2


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    optimizer = AdamW(parameters())
    train(optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "in.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "in.pt", tmp_path / "out.pt", "native")
    back = AdamW(parameters())
    back.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert state_bits(back) == state_bits(optimizer)


def test_states_by_name(tmp_path: Path) -> None:
    """As torch.distributed.checkpoint gathers them."""
    optimizer = AdamW(parameters(((70, 70), (3,))), variant="8bit")
    train(optimizer, 2)
    state_dict = optimizer.state_dict()
    names = {0: "a.weight", 1: "a.bias"}
    state_dict["state"] = {names[key]: entry for key, entry in state_dict["state"].items()}
    state_dict["param_groups"][0]["params"] = list(names.values())
    torch.save(state_dict, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.safetensors", "native")
    back = AdamW(parameters(((70, 70), (3,))), variant="8bit")
    back.load_state_dict(files.load(tmp_path / "out.safetensors"))
    assert state_bits(back) == state_bits(optimizer)


# --- Refusals ---------------------------------------------------------------------------------------------


def cut(path: Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


@pytest.fixture
def good(tmp_path: Path) -> dict[str, Any]:
    optimizer = AdamW(parameters(), variant="8bit")
    train(optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "in.safetensors", "native")
    return copy.deepcopy(optimizer.state_dict())


def refused(source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said, in a line; nothing else is left behind."""
    before = sorted(os.listdir(source.parent))
    capsys.readouterr()
    assert main(["convert", str(source), str(target), "--force", "--to", "torch"]) == 2
    assert sorted(os.listdir(source.parent)) == before
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("adamw-triton convert: ")]
    assert len(said) == 1, error
    assert "Traceback" not in error
    return said[0]


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file(
    good: object, suffix: str, part: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(tmp_path / f"in.{suffix}", part)
    said = refused(tmp_path / f"in.{suffix}", tmp_path / "out.pt", capsys)
    assert f"in.{suffix} is cut short, damaged or no checkpoint" in said


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_garbage(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / f"in.{suffix}"
    source.write_text("hello\n" * 100)
    said = refused(source, tmp_path / "out.pt", capsys)
    assert "is cut short, damaged or no checkpoint" in said
    assert "weights_only" not in said  # torch's advice to switch the protection off


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize("thing", [fractions.Fraction(1), Runs()], ids=["object", "code"])
def test_a_pickle_with_a_disallowed_object(
    good: dict[str, Any],
    thing: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    good["state"][1]["step"] = thing
    torch.save(good, tmp_path / "bad.pt")
    said = refused(tmp_path / "bad.pt", tmp_path / "out.pt", capsys)
    name = "fractions.Fraction" if isinstance(thing, fractions.Fraction) else "posix.mkdir"
    assert f"holds an object of {name}: unpickling it could run any code" in said


def test_what_is_wrong_with_which_parameter(
    good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good["state"][1]["exp_avg_scales"][0] = torch.nan
    torch.save(good, tmp_path / "bad.pt")
    said = refused(tmp_path / "bad.pt", tmp_path / "out.pt", capsys)
    assert "bad.pt: state of parameter 1 of group 0: exp_avg_scales has scales that are NaN" in said


def test_a_whole_checkpoint(good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {}, "optimizer": good}, tmp_path / "bad.pt")
    said = refused(tmp_path / "bad.pt", tmp_path / "out.pt", capsys)
    assert "which has 'state' and 'param_groups': it has ['model', 'optimizer']" in said


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(2), "text", 3])
def test_files_of_something_else(value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(value, tmp_path / "bad.pt")
    assert "not an optimizer's state_dict" in refused(tmp_path / "bad.pt", tmp_path / "out.pt", capsys)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "state": ({"state": [1]}, "state is no dict"),
    "groups": ({"param_groups": {"lr": 1}}, "param_groups no list"),
    "no params": ({"param_groups": [{**HYPER}]}, "is no AdamW's: it has no params"),
    "SGD's": ({"param_groups": [{"lr": 1.0, "params": [0]}]}, "is no AdamW's: it has no betas, eps"),
    "names": (
        {"param_groups": [{**HYPER, "params": [0, 1], "param_names": ["a"]}]},
        "not as many param_names",
    ),
    "entries": ({"state": {5: {"step": 1}}, "param_groups": [{**HYPER, "params": [0]}]}, r"entries for [5]"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_state_dict(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = MALFORMED[kind]
    torch.save({"state": {}, "param_groups": [], **change}, tmp_path / "bad.pt")
    assert message in refused(tmp_path / "bad.pt", tmp_path / "out.safetensors", capsys)


def test_malformed_metadata(good: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    for number, described in enumerate(("{", "{}", '{"param_groups": [{"params": []}]}', "[1]")):
        path = tmp_path / f"bad{number}.safetensors"
        save_file({"0.step": torch.zeros(())}, path, metadata={"adamw_triton": described})
        assert "is cut short, damaged or no checkpoint" in refused(path, tmp_path / "out.pt", capsys)


def test_a_safetensors_file_of_someone_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    said = refused(tmp_path / "model.safetensors", tmp_path / "out.pt", capsys)
    assert "was not written by adamw-triton convert" in said


def test_a_group_that_safetensors_cannot_hold(
    good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good["param_groups"][0]["mask"] = torch.zeros(2)
    torch.save(good, tmp_path / "bad.pt")
    said = refused(tmp_path / "bad.pt", tmp_path / "out.safetensors", capsys)
    assert "param_groups[0]['mask'] is a Tensor, which a safetensors file cannot hold" in said


def test_paths(good: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(tmp_path / "no.pt", tmp_path / "out.pt", capsys)
    assert "no folder" in refused(tmp_path / "in.pt", tmp_path / "no" / "out.pt", capsys)
    assert "directory" in refused(tmp_path, tmp_path / "out.pt", capsys)
    (tmp_path / "folder.pt").mkdir()
    assert "directory" in refused(tmp_path / "in.pt", tmp_path / "folder.pt", capsys)


def test_a_failed_write_leaves_the_old_file(
    good: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.pt"
    out.write_text("old")

    def full(state_dict: object, path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    assert "could not be written" in refused(tmp_path / "in.pt", out, capsys)
    assert out.read_text() == "old"


def test_in_place(good: object, tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    before = path.read_bytes()
    assert main(["convert", str(path), str(path), "--to", "portable"]) == 2
    assert path.read_bytes() == before
    assert main(["convert", str(path), str(path), "--force", "--to", "portable"]) == 0
    assert set(files.load(path)["state"][0]) == release_0.KEYS_32BIT


@pytest.mark.parametrize("to", [*FORMS, "master"])
def test_nothing_is_written_over_unless_forced(
    to: str, good: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("years of work")
    assert main(["convert", str(tmp_path / "in.pt"), str(out), "--to", to]) == 2
    said = capsys.readouterr().err
    assert said == f"adamw-triton convert: {out} is there already: give --force to write over it\n"
    assert out.read_text() == "years of work"


@pytest.mark.parametrize("ending", ["", ".json", ".PT", ".safetensor", ".pt.bak"])
def test_an_ending_that_tells_no_form_is_refused(
    ending: str, good: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(tmp_path / "in.pt", tmp_path / f"out{ending}", capsys)
    assert "ending" in said
    assert ".safetensors, .pt, .pth, .bin, .ckpt" in said


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_every_ending_that_is_written_is_read(ending: str, good: object, tmp_path: Path) -> None:
    out = tmp_path / f"out{ending}"
    assert main(["convert", str(tmp_path / "in.pt"), str(out), "--to", "portable"]) == 0
    assert set(files.load(out)["state"][0]) == release_0.KEYS_32BIT


@pytest.mark.parametrize("package", ["rich", "safetensors"])
def test_a_missing_package_is_named(
    good: object,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(tmp_path / "in.safetensors", tmp_path / "out.pt", capsys)
    assert missing(package, "convert") in said


# --- Memory -----------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
import torch
from adamw_triton.checkpoint.conversion import FORMS, convert
import safetensors.torch, rich.progress

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) << 10

source, target = map(Path, sys.argv[1:3])
convert(source, target, "portable")  # imports of torch's own
before, highest = anonymous(), 0
def track(keys):
    global highest
    for key in keys:
        yield key
        highest = max(highest, anonymous())
convert(source, target, "portable", track)
print(max(highest, anonymous()) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_grow_with_the_checkpoint(suffix: str) -> None:
    """But for the pages of the files, which the system takes back at need: 64 MiB of fp32 pass by."""
    params = [torch.zeros(1 << 19) for _ in range(16)]
    optimizer = AdamW(params, variant="8bit")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        source, target = Path(folder, "in.pt"), Path(folder, f"out.{suffix}")
        torch.save(optimizer.state_dict(), source)
        grown = int(printed(MEASURE, source, target))
        assert target.stat().st_size > 64 << 20
    assert grown < 24 << 20


def test_moments_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    both = torch.arange(10.0)
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    state = {0: {"step": torch.tensor(1.0), "exp_avg": both, "exp_avg_sq": both}}
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", "torch")
    convert(tmp_path / "b.safetensors", tmp_path / "c.pt", "torch")
    again = torch.load(tmp_path / "c.pt")["state"][0]
    assert torch.equal(again["exp_avg"], both)
    assert torch.equal(again["exp_avg_sq"], both)


@pytest.mark.parametrize("wrong", [{"lr": math.inf}, {"betas": (1.5, 0.9)}, {"eps": -1.0}], ids=str)
def test_groups_that_no_optimizer_would_take_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": [0], **wrong}
    torch.save({"state": {}, "param_groups": [group]}, tmp_path / "a.pt")
    with pytest.raises(files.CheckpointError, match=r"param_groups\[0\]: Invalid"):
        convert(tmp_path / "a.pt", tmp_path / "b.pt", "torch")
    assert not (tmp_path / "b.pt").exists()


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(files.CheckpointError, match="a pipe or a device"):
        convert(tmp_path / "a.pt", tmp_path / "b.pt", "torch")
