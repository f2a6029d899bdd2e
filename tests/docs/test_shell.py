"""Every command in a page exists, takes the options that it is given, and prints what the page says."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from adamw_triton.cli import build_parser, main
from bench.commands import COMMANDS, PROOFS, SUITES
from tests.docs import given
from tests.docs.pages import OTHERS, PAGES, ROOT, Block, blocks

SHELL = [each for page in [*PAGES, *OTHERS] for each in blocks(page) if each.kind == "sh"]
PLAN = "adamw-triton plan "


def commands(block: Block) -> list[list[str]]:
    """Words of each; what is assigned before a command, and its comment, apart."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [shlex.split(line, comments=True) for each in joined.splitlines() for line in each.split(" && ")]
    found = []
    for words in filter(None, lines):
        while "=" in words[0]:
            words = words[1:]
        found.append(words)
    return found


def check(words: list[str]) -> None:
    """That such a command can be given."""
    match words:
        case ["adamw-triton", *arguments]:
            build_parser().parse_args(arguments)
        case ["pip", "install", "-e", what] | ["pip", "install", what]:
            assert re.fullmatch(r"\.\[[\w,]+\]", what)  # tests/package/test_installing.py knows which
        case ["python", "-m", "bench", command, *_]:
            assert command in {**COMMANDS, **PROOFS, **SUITES}
        case ["python", "-m", "sphinx", *_]:  # of an extra that need not be there
            assert {"-c", "docs", "docs/build"} <= set(words)
        case ["python", "-m", module, *_] | ["accelerate", "launch", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, module
        case ["python", script, *arguments] | ["torchrun", _, _, script, *arguments]:
            text = (ROOT / script).read_text()
            for option in (each for each in arguments if each.startswith("--")):
                assert f'"{option}"' in text, option
        case [".ci/run"]:
            assert (ROOT / ".ci" / "run").exists()
        case ["ruff" | "mypy", *_]:
            pass
        case _:
            raise AssertionError(f"tests/docs does not know what {words} would do")


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_ours_and_take_this(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(block):
        check(words)


@pytest.mark.parametrize(
    "words",
    ["adamw-triton plan --gpus T4", "python -m bench fidelty", "python examples/lora.py --model x --rank 3"],
)
def test_and_no_others(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(shlex.split(words))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    given.folders(folder)
    return folder


PLANS = [
    (block, page[index + 1 : index + 2])
    for page in map(blocks, PAGES)
    for index, block in enumerate(page)
    if block.kind == "sh" and block.text.startswith(PLAN)
]


@pytest.mark.parametrize(
    ("block", "after"), PLANS, ids=lambda each: str(each) if isinstance(each, Block) else ""
)
def test_plans_print_what_the_page_says(
    block: Block, after: list[Block], models: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(models)
    code = main(shlex.split(block.text)[1:])
    printed = versionless(capsys.readouterr().out)
    if after and after[0].mark == "prints":
        assert printed.rstrip() == versionless(after[0].text).rstrip()
    assert code in (0, 1)
    assert "optimizer" in printed


def versionless(text: str) -> str:
    return re.sub(r"transformers \S+ as", "transformers as", text)


def test_what_is_printed_stands_behind_a_plan() -> None:
    marked = [each for page in PAGES for each in blocks(page) if each.mark == "prints"]
    assert marked
    assert {str(each) for each in marked} == {
        str(after[0]) for _, after in PLANS if after and after[0].mark == "prints"
    }
