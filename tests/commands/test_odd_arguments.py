"""Odd arguments of every sub-command: refused in one line that says what is wrong, never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adamw_triton.cli import main

Arguments = tuple[str, ...]
GPU = ("--gpu", "24GiB", "--host-memory", "64GiB")
ODD = {
    "plan": [
        ("--params", "1.5"), ("--params", "٣"), ("--params", "7B", "--gpu", "nan"), ("--gpu", "T4"),
        ("", *GPU),
        ("/dev/null", *GPU), ("--params", "7B", "--gpu", "T4", "--host-memory", "inf"),
        ("--params", "7B", "--gpu", "T4", "--dtype", "BF16"), ("https://huggingface.co/a/b", *GPU),
        ("--params", "7B", "--gpu", "T4", "--lora", "8", "--quantized-base", "8"),
        ("--params", "7B", "--gpu", "T4", "--lora-targets", "all-linear"),
    ],
    "demo": [
        ("--steps", "0"), ("--steps", "-1"), ("--seed", str(1 << 70)), ("--seed", str(-1 << 70)),
        ("--out", "/no/such/x.png"), ("--out", "x.xyz"), ("--device", "gpu"), ("--device", "meta"),
        ("--device", ""), ("--variants", "nope"),
    ],
    "convert": [
        (source, target, "--to", "torch")
        for source in ("", "/no/such", "/dev/null", "text.pt", "text.safetensors", "empty.pt")
        for target in ("o.pt", "/no/such/o.pt")
    ],
}  # fmt: skip


@pytest.mark.parametrize(("command", "arguments"), [(name, each) for name in ODD for each in ODD[name]])
def test_odd_arguments_are_refused_in_one_line_of_words(
    command: str,
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command in ("demo", "convert"):
        pytest.importorskip("rich")
    if command == "demo":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name in ("text.pt", "text.safetensors", "empty.pt"):
        Path(name).write_text("hello" * (not name.startswith("empty")))
    assert main([command, *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"adamw-triton {command}: ")
    assert output.err.count("\n") == 1
    assert not re.search(r": '?\d+'?$", output.err), "a bare number says nothing"
