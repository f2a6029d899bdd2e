"""The tables of the page about moving: what stands on their left exists, what stands on their right does the
same. A Trainer's script is moved by them alone."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import adamw_triton
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "guides" / "moving.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| .+ \| .*`", line)
]
CODE = re.compile(r"`([^`]+)`")


def calls(cell: str) -> list[ast.Call]:
    found = []
    for text in CODE.findall(cell):
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            continue  # a keyword by itself
        if isinstance(tree, ast.Call) and "..." not in text:
            found.append(tree)
    return found


THEIRS = [call for row in ROWS for call in calls(row[0])]
OURS = [call for row in ROWS for call in calls(row[1]) if "AdamW" in ast.unparse(call)]


def libraries() -> dict[str, Any]:
    bnb = pytest.importorskip("bitsandbytes")
    torchao = pytest.importorskip("torchao.optim")
    flashoptim = pytest.importorskip("flashoptim")
    names = {"bnb": bnb, "torch": torch}
    for module in (torchao, flashoptim, torch.nn.utils):
        names |= {name: getattr(module, name) for name in dir(module) if name[0] != "_"}
    return names


def test_the_tables_are_read() -> None:
    assert len(ROWS) > 20
    assert len(THEIRS) > 8
    assert len(OURS) > 8


@pytest.mark.parametrize("call", THEIRS, ids=ast.unparse)
def test_what_is_left_behind_exists(call: ast.Call) -> None:
    called = eval(ast.unparse(call.func), libraries())
    parameters = inspect.signature(called).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        assert {keyword.arg for keyword in call.keywords} <= set(parameters)
    assert len(call.args) <= len(parameters)


@pytest.mark.parametrize("call", OURS, ids=ast.unparse)
def test_what_is_written_instead_steps(call: ast.Call) -> None:
    weight = torch.nn.Parameter(torch.zeros(80, 80))
    optimizer = eval(ast.unparse(call), {"adamw_triton": adamw_triton, "params": [weight], "lr": 0.1})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert float(weight.max()) < 0


STRINGS = [
    (theirs.split("=")[-1].strip('"'), CODE.findall(row[1])[0].split("=")[-1].strip('"'))
    for row in ROWS
    if row[0].startswith("`optim=")
    for theirs in CODE.findall(row[0])
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="trains on the CPU")
@pytest.mark.parametrize(("theirs", "ours"), STRINGS)
def test_a_trainers_script_moves_by_its_string(theirs: str, ours: str, tmp_path: Path) -> None:
    """Losses are nearly the same; and their checkpoint goes on under our string."""
    for library in ("transformers", "accelerate", "bitsandbytes"):
        pytest.importorskip(library)
    from tests.huggingface.tiny import arguments, llama, losses, trainer

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    before = trainer(arguments(tmp_path / "out", theirs, **saving), llama())
    before.train()
    after = trainer(arguments(tmp_path / "ours", ours), llama())
    after.train()
    assert losses(after) == pytest.approx(losses(before), abs=0.05)
    resumed = trainer(arguments(tmp_path / "ours", ours), llama())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert losses(resumed) == pytest.approx(losses(before), abs=0.05)
