"""Every block of Python in docs/ and the README runs, one after another, as a reader types them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs import given
from tests.docs.pages import PAGES, ROOT, Block, blocks, name_of

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

CODE = {name_of(page): [each for each in blocks(page) if each.kind == "python"] for page in PAGES}
PYTHON = [name for name, found in CODE.items() if found]
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="batches here are on the CPU")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    given.folders(folder)
    return folder


@pytest.fixture
def at_home(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState

    for each in models.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    AcceleratorState._reset_state(True)


def test_there_are_blocks() -> None:
    assert sum(map(len, CODE.values())) > 25
    marks = {each.mark for page in PAGES for each in blocks(page)}
    assert marks <= {"", "gpu", "prints", "tests"}


@needs_cpu
@pytest.mark.parametrize("page", PYTHON)
def test_blocks_run(page: str, at_home: None) -> None:
    for library in ("peft", "bitsandbytes", "lightning", "tensorboard", "matplotlib", "prometheus_client"):
        if any(library in block.text for block in CODE[page]):
            pytest.importorskip(library)
    with given.PREPARED.get(page, nullcontext)() as more:
        seen = {**given.names(), **(more or {})}
        for block in CODE[page]:
            if block.mark != "gpu":
                exec(compile(placed(block), str(block.page), "exec"), seen)


@pytest.mark.parametrize("page", PYTHON)
def test_blocks_compile(page: str) -> None:
    for block in CODE[page]:
        ast.parse(block.text, str(block))


def test_blocks_have_types(tmp_path: Path) -> None:
    """Those that do not run here, too."""
    pytest.importorskip("mypy")
    for index, found in enumerate(CODE.values()):
        head = "from typing import Any\n\nimport adamw_triton\nimport torch\n\n"
        head += "".join(f"{name}: Any\n" for name in given.NAMES if name not in ("adamw_triton", "torch"))
        head += "optimizer: Any\nllama_3b: Any\n"
        text = "\n".join(block.text for block in found)
        (tmp_path / f"page_{index}.py").write_text(head + text)
    # Ours alone are followed: torch is half a minute's reading.
    settings = "[mypy]\ncheck_untyped_defs = True\nallow_redefinition = True\nfollow_imports = skip\n"
    settings += "ignore_missing_imports = True\n[mypy-adamw_triton.*]\nfollow_imports = silent\n"
    (tmp_path / "mypy.ini").write_text(settings)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), str(tmp_path)],
        env={**os.environ, "MYPYPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout


def placed(block: Block) -> Any:
    """So that a traceback names the page's line."""
    tree = ast.parse(block.text)
    return ast.increment_lineno(tree, block.line - 1)
