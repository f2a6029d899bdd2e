"""``python -m adamw_triton.huggingface``: scripts that know nothing of us."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import adamw_triton.huggingface

SCRIPT = """
import json, os, sys
from transformers.training_args import OptimizerNames
found = [__name__, sys.argv, sys.path[0], OptimizerNames(sys.argv[1]).name]
open(os.environ["FOUND"], "w").write(json.dumps(found))
"""


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """As the command line would, in this process."""
    monkeypatch.setattr(sys, "argv", [str(adamw_triton.huggingface.__file__), *arguments])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    runpy.run_module("adamw_triton.huggingface", run_name="__main__")


def test_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("FOUND", str(tmp_path / "found"))
    launch(monkeypatch, str(script), "adamw_triton_8bit", "--steps", "3")
    name, words, folder, member = json.loads((tmp_path / "found").read_text())
    assert name == "__main__"
    assert words == [str(script), "adamw_triton_8bit", "--steps", "3"]
    assert (folder, member) == (str(tmp_path), "ADAMW_TRITON_8BIT")


def test_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "training_script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FOUND", str(tmp_path / "found"))
    launch(monkeypatch, "-m", "training_script", "adamw_triton_8bit")
    name, words, _, member = json.loads((tmp_path / "found").read_text())
    assert (name, member) == ("__main__", "ADAMW_TRITON_8BIT")
    assert Path(words[0]).name == "training_script.py"


@pytest.mark.parametrize("arguments", [(), ("-m",), ("--optim", "adamw_triton")])
def test_without_a_script(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        launch(monkeypatch, *arguments)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: python -m adamw_triton.huggingface")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_what_was_asked_for(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, option)
    assert capsys.readouterr().out.startswith("usage: python -m adamw_triton.huggingface")


@pytest.mark.parametrize("before", [(), ("-m",)])
def test_help_after_the_script_is_the_scripts(
    before: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "helped.py").write_text("import sys; print(sys.argv[1:])")
    monkeypatch.syspath_prepend(str(tmp_path))
    launch(monkeypatch, *before, "helped" if before else str(tmp_path / "helped.py"), "--help")
    assert capsys.readouterr().out == "['--help']\n"
