"""The optimizer's steps by compiled kernels, without a GPU, beside those of plain torch.

Only with ``ADAMW_TRITON_COMPILED=sm_90``, with which all tests of this folder run on compiled kernels:
tests/kernels/test_compiled.py starts some of them so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adamw_triton import AdamW
from adamw_triton.step import batch
from adamw_triton_kernels import reference
from tests.optimizer.problems import SHAPES, parameters, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_32bit", "paged_8bit"])
def test_steps_are_those_of_plain_torch(
    compiled: Callable[..., Any], variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a few weights, after several steps."""

    def trained() -> list[torch.Tensor]:
        return train(AdamW(parameters(SHAPES, dtype), lr=1e-2, weight_decay=0.1, variant=variant), 3)

    session = compiled(int(os.environ["ADAMW_TRITON_COMPILED"].removeprefix("sm_")), races=True)
    ours = trained()
    monkeypatch.setattr(batch, "update_for", lambda name, device: getattr(reference, name))
    launches = session.launches
    theirs = trained()
    assert session.launches == launches > 0
    assert not [kind for kind in session.conflicts() if "harmless" not in kind]
    for a, b in zip(ours, theirs, strict=True):
        allowed = 4 * torch.finfo(dtype).eps * (b.double().abs() + 0.03)
        assert ((a.double() - b.double()).abs() > allowed).double().mean() < 1e-3
