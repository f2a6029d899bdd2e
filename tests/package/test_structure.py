"""The shape of the package: which room may import which, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Upper rooms first: a module may import only from rooms below its own.
ROOMS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"demo", "doctor", "fits"},
    {"huggingface", "architectures"},
    {"trainer_arguments", "monitoring"},
    {"__init__"},
    {"optimizer", "store", "grouping"},
    {"places"},
    {"selection", "step", "checkpoint"},
    {"arguments", "tensors"},
    {"paging"},
    {"state"},
    {"memory"},
    {"telemetry", "models", "interrupts", "installing", "choices", "_version"},
]
KERNEL_ROOMS = [
    {"ahead"},
    {"adamw_32bit", "adamw_8bit", "norm_kernels"},
    {"launch", "blockwise", "update_rule"},
    {"rounding", "statistic_kernels"},
    {"__init__"},
    {"reference", "norms"},
    {"codes", "weights", "statistics"},
    {"fusion", "runs"},
    {"work", "tables"},
]
# `update_rule` serves `blockwise`; both are below the kernels.
SAME_ROOM = {("blockwise", "update_rule"), ("demo", "demo")}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def level(rooms: list[set[str]], module: str) -> int:
    return next(i for i, room in enumerate(rooms) if module in room)


@pytest.mark.parametrize(
    ("folder", "package", "rooms"),
    [
        ("adamw_triton", "adamw_triton", ROOMS),
        ("kernels/adamw_triton_kernels", "adamw_triton_kernels", KERNEL_ROOMS),
    ],
)
def test_imports_go_one_way(folder: str, package: str, rooms: list[set[str]]) -> None:
    known = set().union(*rooms)
    for path in modules(folder):
        here = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        assert here in known, f"{path} belongs to no room: give it one in this test and in ARCHITECTURE.md"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != package or len(parts) == 1 or parts[1] not in known:
                continue
            there = parts[1]
            if here != there and (here, there) not in SAME_ROOM:
                assert level(rooms, here) < level(rooms, there), f"{here} imports {there}"


def test_no_imports_of_the_measurements_go_in_a_circle() -> None:
    here = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules("bench")}
    below = {name: {found for found in imports(path) if found in here} for name, path in here.items()}
    while free := {name for name, found in below.items() if not found & below.keys()}:
        below = {name: found for name, found in below.items() if name not in free}
    assert not below


def test_kernels_know_nothing_of_the_optimizer() -> None:
    for path in modules("kernels"):
        assert not {name for name in imports(path) if name.split(".")[0] == "adamw_triton"}, path


def test_triton_stays_in_the_kernels() -> None:
    for path in modules("adamw_triton"):
        assert not {name for name in imports(path) if name.split(".")[0] == "triton"}, path


def test_transformers_stays_in_its_room() -> None:
    for path in modules("adamw_triton"):
        if not {"huggingface", "architectures.py"} & set(path.relative_to(ROOT).parts):
            assert not {name for name in imports(path) if name.split(".")[0] == "transformers"}, path


def test_plain_torch_needs_no_triton() -> None:
    for name in ("reference", "codes", "weights", "work", "statistics", "__init__"):
        path = ROOT / "kernels/adamw_triton_kernels" / f"{name}.py"
        assert not {module for module in imports(path) if module.split(".")[0] == "triton"}, path


def test_kernels_is_no_package() -> None:
    """An ``__init__.py`` there would shadow Hugging Face's package `kernels` in this folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


TRAIN_A_LITTLE = """
import torch, transformers
config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
                                  num_hidden_layers=1, num_attention_heads=2)
model = transformers.LlamaForCausalLM(config)
tokens = torch.arange(8)[None]
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
print("trained", float(loss))
"""

HIDE_KERNELS = """
import importlib.machinery, importlib.metadata, sys

real = importlib.metadata.distribution
def distribution(name):
    if name == "kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
importlib.metadata.version = lambda name: distribution(name).version
sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry] + [WITHOUT]
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_package", [True, False])
def test_transformers_trains_from_the_root(with_package: bool, tmp_path: Path) -> None:
    """With Hugging Face's `kernels` installed and without: our folder of that name is harmless."""
    pytest.importorskip("transformers")
    package = pytest.importorskip("kernels", reason="the PyPI package `kernels`")
    site = Path(package.__file__).parents[1]
    assert site != ROOT
    prelude = ""
    if not with_package:
        mirror = tmp_path / "site"
        mirror.mkdir()
        for entry in site.iterdir():
            if not entry.name.startswith("kernels"):
                (mirror / entry.name).symlink_to(entry)
        prelude = HIDE_KERNELS.replace("WITHOUT", repr(str(mirror)))
    code = "import sys; sys.path.insert(0, '')\n" + prelude + TRAIN_A_LITTLE
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "trained" in run.stdout
