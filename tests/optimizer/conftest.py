import os

import pytest
import torch

from tests.interpreted import LARGE

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
    else:
        large_tiles(monkeypatch)
    return str(request.param)


def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones and tails as ever, but fewer of them: with tiles of their own size, kernels are tested in
    tests/kernels."""
    from adamw_triton_kernels import adamw_8bit, adamw_32bit

    tile, tail = LARGE
    monkeypatch.setattr(adamw_32bit, "TILE", tile)
    monkeypatch.setattr(adamw_32bit, "TAIL", tail)
    for block, (threads, *_) in adamw_8bit.SHAPES.items():
        monkeypatch.setitem(adamw_8bit.SHAPES, block, (threads, tile, tail))
