import pytest
import torch


@pytest.fixture(autouse=True, params=["torch", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of the optimizer, once in plain torch and once through the interpreted kernels."""
    if request.param == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    elif torch.cuda.is_available():
        pytest.skip("with a GPU, triton is not interpreted")
    return str(request.param)
