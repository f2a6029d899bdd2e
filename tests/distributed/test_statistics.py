"""Statistics of shards are those of whole parameters, on every rank; replicas count once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adamw_triton import AdamW
from tests.distributed.ranks import together
from tests.distributed.training import Blocks, sharded

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "32bit": {"variant": "32bit"},
    "paged 8bit": {"variant": "paged_8bit", "max_grad_norm": 0.5},
    "exact": {"variant": "8bit", "master_weights": True, "nonfinite": "skip"},
}
WAYS: dict[str, tuple[int, tuple[int, int] | None]] = {"2 shards": (2, None), "replicas": (4, (2, 2))}


class Squares(Blocks):
    """Of what comes out, which gives gradients even where that is one number."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.embed(input_ids)
        for layer in self.model.layers:
            x = x + layer(x)
        return self.head(x).float().square().mean()


def told(mesh: tuple[int, int] | None, alone: bool) -> dict[str, tuple[dict[str, float], str]]:
    """Of each case, after steps of which the last one looks at a NaN."""
    found = {}
    for name, arguments in CASES.items():
        dtype = torch.bfloat16 if name == "exact" else torch.float32
        # Of one row, some ranks have nothing.
        model: torch.nn.Module = Squares(vocab_size=1 if name == "32bit" else 256).to(dtype)
        model = model if alone else sharded(model, mesh)
        optimizer = AdamW(model.named_parameters(), telemetry=True, **arguments)
        for step in range(3):
            ids = torch.zeros(2, 8, dtype=torch.long) if name == "32bit" else torch.arange(16).view(2, 8)
            loss = model(input_ids=ids, labels=ids)
            (loss * (torch.nan if step == 2 and name == "exact" else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        report = str(optimizer.diagnose(across_ranks=not alone))
        found[name] = optimizer.stats(per_param=True), report
    return found


@pytest.mark.parametrize("way", WAYS)
def test_ranks_say_what_one_process_does(way: str) -> None:
    world, mesh = WAYS[way]
    expected = told(None, alone=True)
    for found in together(world, told, mesh, False):
        for name, (stats, report) in expected.items():
            assert found[name][0].keys() == stats.keys()
            assert found[name][1] == report
            for key, value in stats.items():
                assert found[name][0][key] == pytest.approx(value, rel=1e-5, abs=1e-12, nan_ok=True), (
                    name,
                    key,
                )
