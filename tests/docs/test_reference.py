"""Nothing that is public is missing from the reference."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import adamw_triton
from adamw_triton import monitoring
from adamw_triton.monitoring import plots
from docs._ext import grammar
from tests.docs.pages import ROOT

REFERENCE = ROOT / "docs" / "reference"
TEXT = "\n".join(page.read_text() for page in sorted(REFERENCE.glob("*.md")))
ENTRY = re.compile(r"^\.\. (?:auto|py:)(class|function|data|module):: ([\w.]+)\n((?:   :.*\n)*)", re.M)


def documented() -> dict[str, str]:
    """Full names, each with the members that its entry lists. ``py:data`` stands in the module before it."""
    found, module = {}, ""
    for kind, name, options in ENTRY.findall(TEXT):
        full = name if "." in name or kind == "module" else f"{module}.{name}"
        if kind == "module":
            module = name
        members = re.search(r":members: (.*)", options)
        found[full] = members[1] if members else ""
        found |= dict.fromkeys((f"{full}.{each}" for each in found[full].split(", ") if each), "")
    return found


def public(owner: type) -> set[str]:
    """What a class of ours adds, or says anew, for others to call."""
    return {
        name
        for name, value in vars(owner).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, property | classmethod))
    }


NAMES = documented()


@pytest.mark.parametrize("module", [adamw_triton, monitoring], ids=lambda each: each.__name__)
def test_public_names(module: Any) -> None:
    assert {f"{module.__name__}.{name}" for name in module.__all__} <= set(NAMES)


def test_public_names_for_hugging_face() -> None:
    pytest.importorskip("transformers")
    import adamw_triton.huggingface as ours

    assert {f"{ours.__name__}.{name}" for name in ours.__all__} <= set(NAMES)


def test_plots() -> None:
    shown = {name for name, value in vars(plots).items() if inspect.isfunction(value) and name[0] != "_"}
    helpers = {"layer_of", "read_json_lines"}
    assert {f"{plots.__name__}.{name}" for name in shown - helpers} <= set(NAMES)


@pytest.mark.parametrize("owner", [adamw_triton.AdamW, adamw_triton.Plan], ids=lambda each: each.__name__)
def test_members(owner: type) -> None:
    """``Plan``'s others are for whoever selects."""
    inner = {"without", "without_chosen", "of_kind"}
    missing = {name for name in public(owner) - inner if f"adamw_triton.{owner.__name__}.{name}" not in NAMES}
    assert not missing
    assert all(getattr(owner, name).__doc__ for name in public(owner))


def test_entries_exist() -> None:
    for name in NAMES:
        if name.startswith(("adamw_triton.huggingface", "adamw_triton.monitoring.lightning")):
            continue  # of libraries that need not be there
        module, found = name.split("."), None
        while module and found is None:
            try:
                found = __import__(".".join(module), fromlist=["x"])
            except ImportError:
                module.pop()
        for part in name.split(".")[len(module) :]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[part] if part in fields else getattr(found, part)
        assert found is not None


def test_every_argument_of_the_optimizer_is_explained() -> None:
    docstring = inspect.getdoc(adamw_triton.AdamW) or ""
    as_torchs = {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"}
    for name in inspect.signature(adamw_triton.AdamW).parameters:
        assert name in as_torchs or re.search(rf"^    (\w+, )*{name}\b.*:", docstring, re.M), name


def test_every_command_and_option_is_in_the_reference() -> None:
    page = (REFERENCE / "command_line.md").read_text()
    commands = grammar.commands()
    assert len(commands) >= 5
    for name, parser in commands.items():
        assert f"```{{command-line}} {name}\n" in page
        assert f"\n## adamw-triton {name}\n" in page
        shown = dict(grammar.options(parser))
        for action in parser._actions:
            flags = ", ".join(action.option_strings)
            if flags:
                (written,) = [each for each in shown if f"{each} ".startswith(f"{flags} ")]
                assert shown[written], f"{name} {flags} has no help"


def test_the_launchers_usage() -> None:
    text = (ROOT / "adamw_triton" / "huggingface" / "__main__.py").read_text()
    usage = re.search(r"usage: (.*)", text)
    assert usage is not None
    assert usage[1] in TEXT


def test_a_name_that_is_not_there_would_be_missed() -> None:
    assert "adamw_triton.AdamW.diagnosis" not in NAMES
    assert Path(REFERENCE / "optimizer.md").exists()
