"""Where nothing fits, the ways out that are printed are typed, word by word: all of it is needed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from adamw_triton.cli import main
from adamw_triton.fits import changes

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
HOST = "--host-memory 25GiB"
UNDO = "without "

CASES = {
    "7B on a T4": (f"{CONFIGS}/Llama-2-7B --gpu T4", "--release --seq 1024"),
    "accumulated": (f"{CONFIGS}/Llama-3.2-3B --gpu T4 --accumulation 4", "--release --accumulate-on host"),
    "a guess": ("--params 7B --gpu T4", "--seq 1024 --lora 16 --quantized-base 4"),
    "adapters": (f"{CONFIGS}/Llama-2-7B --gpu 8GiB --lora 8", "--quantized-base 4"),
    "fp32 without checkpoints": (
        f"{CONFIGS}/Llama-2-7B --gpu 16GiB --dtype fp32 --no-checkpointing",
        "without --no-checkpointing --release --dtype bf16",
    ),
    "several sequences": (f"{CONFIGS}/Llama-3.2-3B --gpu T4 --batch 4 --release", "--batch 2"),
    "replicas": (f"{CONFIGS}/Llama-3.2-3B --gpu 3060 --ranks 4 --sharding none", "--sharding full"),
}


def planned(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *shlex.split(f"{line} {HOST}"), "--json"])
    return code, json.loads(capsys.readouterr().out)


def changed(line: str, options: list[str]) -> str:
    """Typed at the end, where the last of an option counts; `without` takes one away."""
    for option in options:
        undone = option.removeprefix(UNDO)
        line = f"{line} {option}" if undone == option else line.replace(f" {undone}", "")
    return line


def parts(options: str) -> list[str]:
    """``"--seq 256 --lora 16"`` is two; adapters go with the base that needs them."""
    found = [f"--{part}".strip() for part in options.replace(f"{UNDO}--", "--/").split("--") if part.strip()]
    found = [part.replace("--/", f"{UNDO}--") for part in found]
    for together in (("--lora 16", "--quantized-base 4"), ("--release", "--accumulate-on host")):
        if set(together) <= set(found):
            found = [part for part in found if part not in together] + [" ".join(together)]
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_way_fits_and_needs_all_of_its_changes(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, first = CASES[case]
    code, said = planned(line, capsys)
    assert code == 1
    monkeypatch.setattr(changes, "that_fit", lambda *_: [])
    assert said["would_fit"][0]["options"] == first
    for way in said["would_fit"]:
        options = parts(way["options"])
        code, found = planned(changed(line, options), capsys)
        assert (code, found["plan"]["chosen"]) == (0, way["chosen"])
        for option in options:
            left = [each for each in options if each != option]
            assert planned(changed(line, left), capsys)[0] == 1, f"{option} is idle"


def test_people_read_them_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *shlex.split(f"{CASES['7B on a T4'][0]} {HOST}")]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("Nothing fits. What would, the least change first:")
    assert lines[at + 1] == "  --release --seq 1024 (8bit, partly paged)"
    assert all(line.startswith("  --") for line in lines[at + 1 :])
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("line", ["--params 100M --gpu 64MiB", f"{CONFIGS}/Llama-2-7B --gpu 1GiB"])
def test_where_nothing_helps_it_is_said(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(line, capsys)[1]["would_fit"] == []
    assert main(["plan", *shlex.split(f"{line} {HOST}")]) == 1
    assert "Nothing fits, whatever is changed here" in capsys.readouterr().out


def test_what_fits_is_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(f"{CONFIGS}/Llama-3.2-3B --gpu H100", capsys)[1]["would_fit"] == []
    assert main(["plan", *shlex.split(f"{CONFIGS}/Llama-3.2-3B --gpu H100 {HOST}")]) == 0
    assert "othing fits" not in capsys.readouterr().out
