"""Without a GPU, Triton kernels run in Triton's interpreter, which has to be asked for before triton is
imported: also before torch imports it at some first step. The optimizer takes Triton for CPU tensors only
while the variable is set, so tests see it only where they are about the kernels."""

import importlib
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """CPU tensors are updated in plain torch; folders about the kernels override this."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return "torch"
