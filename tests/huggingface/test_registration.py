"""Without transformers, or with one whose inside is not what we know, importing says what to do."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from adamw_triton import installing
from adamw_triton.huggingface import register

ENUM = "from enum import Enum\nclass OptimizerNames(str, Enum):\n    SGD = 'sgd'\n"
TRAINER = (
    "class Trainer:\n    @staticmethod\n"
    "    def get_optimizer_cls_and_kwargs(args, model=None):\n        return None, {}\n"
)


@pytest.mark.slow
def test_transformers_is_missing() -> None:
    code = "import sys; sys.modules['transformers'] = None; import adamw_triton.huggingface"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: adamw_triton.huggingface needs transformers")
    assert installing.command("hf") in last


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], types.ModuleType]:
    """Puts another transformers in the place of the real one, made of this source."""

    def install(enum: str, trainer: str) -> types.ModuleType:
        sources = {"": "__version__ = '9.9.9'", ".training_args": enum, ".trainer": trainer}
        for name, source in sources.items():
            module = types.ModuleType(f"transformers{name}")
            exec(source, vars(module))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return sys.modules["transformers.training_args"]

    return install


def test_the_stand_in_as_such_is_accepted(stand_in: Any) -> None:
    names = stand_in(ENUM, TRAINER).OptimizerNames
    register()
    assert names("adamw_triton_8bit").name == "ADAMW_TRITON_8BIT"


@pytest.mark.parametrize(
    ("enum", "trainer", "problem"),
    [
        ("OptimizerNames = ['sgd']", TRAINER, "OptimizerNames is not an enum of strings"),
        (ENUM.replace("str, ", ""), TRAINER, "OptimizerNames is not an enum of strings"),
        ("", TRAINER, "OptimizerNames is not an enum of strings"),
        (ENUM, "", "Trainer has no static method get_optimizer_cls_and_kwargs"),
        (ENUM, "class Trainer: pass", "Trainer has no static method get_optimizer_cls_and_kwargs"),
        (ENUM, TRAINER.replace("    @staticmethod\n", ""), "Trainer has no static method"),
        (ENUM, TRAINER.replace("args, model=None", "self, job"), "takes (self, job), not (args, model)"),
    ],
)
def test_internals_that_we_do_not_know(stand_in: Any, enum: str, trainer: str, problem: str) -> None:
    names = stand_in(enum, trainer)
    with pytest.raises(ImportError, match=r"transformers 9\.9\.9 is not as adamw_triton knows it") as caught:
        register()
    message = str(caught.value)
    assert problem in message
    assert "Trainer(..., optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, variant='8bit'))" in message
    assert "from adamw_triton.trainer_arguments import optimizer_cls_and_kwargs" in message
    assert "adamw_triton" not in str(list(getattr(names, "OptimizerNames", [])))


def test_a_module_that_is_gone_and_one_that_transformers_misses(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(ENUM, TRAINER)
    sys.modules["transformers"].__path__ = [str(tmp_path)]
    monkeypatch.delitem(sys.modules, "transformers.trainer")
    with pytest.raises(ImportError, match=r"knows it \(No module named 'transformers\.trainer'"):
        register()
    (tmp_path / "trainer.py").write_text("import a_package_that_is_not_installed")
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_package_that_is_not_installed'"):
        register()
