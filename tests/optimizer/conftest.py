import os

import pytest
import torch

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.slow)]
if os.environ.get("ADAMW_TRITON_COMPILED"):
    BACKENDS = ["triton"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, as_asked: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of the optimizer, once in plain torch and once through the interpreted kernels; or through
    compiled ones alone."""
    if as_asked:
        return "triton"
    if request.param == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    elif torch.cuda.is_available():
        pytest.skip("with a GPU, triton is not interpreted")
    return str(request.param)
