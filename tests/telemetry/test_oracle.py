"""What updates leave of themselves in plain torch is what float64 makes of copies taken before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adamw_triton import AdamW
from tests.optimizer.problems import DTYPES, parameters, set_grads
from tests.telemetry.oracle import Watched

HOW: dict[str, dict[str, Any]] = {
    "32bit": {},
    "8bit": {"variant": "8bit"},
    "paged_8bit": {"variant": "paged_8bit"},
    "exact": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "clipped": {"max_grad_norm": 1.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_every_number(how: str, dtype: torch.dtype) -> None:
    if how == "stochastic" and dtype is torch.float16:
        pytest.skip("for bf16")
    params = parameters(dtype=dtype)
    named = [(f"layer{index}", param) for index, param in enumerate(params)]
    optimizer = AdamW(named, weight_decay=0.1, **{"variant": "32bit", "telemetry": True, **HOW[how]})
    watched = Watched(optimizer, stochastic=how == "stochastic")
    for step in range(1, 5):
        set_grads(params, step)
        if step == 2:
            params[1].grad = None
        expected = watched.step()
        found = optimizer._statistics.history()[-1]
        assert (found.step, found.idle) == (expected.step, expected.idle)
        assert {each.name: each for each in found.tensors} == {each.name: each for each in expected.tensors}
        order = [found.tensors.index(each) for each in expected.tensors]
        for metric, values in expected.each.items():
            close = torch.isclose(found.each[metric][order], values, rtol=1e-5, atol=0.0, equal_nan=True)
            assert close.all(), metric
        for metric, value in expected.total.items():
            assert found.total[metric] == pytest.approx(value, rel=1e-5), metric
