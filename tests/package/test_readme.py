"""What the README shows works as it stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import adamw_triton

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def snippet(section: str) -> str:
    """The first Python of a section."""
    return README.partition(f"\n## {section}\n")[2].partition("```python\n")[2].partition("```")[0]


def test_bf16_without_lost_updates() -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(80, 80), "norm": nn.LayerNorm(80)}).bfloat16()
    code = snippet("bf16 without lost updates")
    assert code.count("optimizer") >= 5
    seen = {"adamw_triton": adamw_triton, "model": model}
    exec(code, seen)
    optimizer, masters = seen["optimizer"], seen["masters"]
    assert isinstance(optimizer, adamw_triton.AdamW)
    assert isinstance(masters, dict)
    assert optimizer.variant == "paged_8bit"
    assert all(value.dtype is torch.float32 for value in masters.values())


def test_the_optimizer_at_its_head() -> None:
    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            self.loss = super().forward(x).square().sum()
            return self.loss

    code = README.partition("```python\n")[2].partition("```")[0].replace(".loss", "")
    model = Model(3, 3)
    before = model.weight.detach().clone()
    exec(code, {"model": model, "batches": [{"x": torch.ones(2, 3)}] * 2})
    assert not torch.equal(model.weight, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would shard on the GPU, without NCCL")
def test_more_than_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the only rank; tests/distributed has more."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128)])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](hidden))

    model = Model()
    begin, save, load = snippet("More than one GPU").replace("checkpoint-100", str(tmp_path)).split("...\n")
    seen = {"adamw_triton": adamw_triton, "model": model}

    def train() -> dict[str, Any]:
        model(torch.ones(2, 128)).sum().backward()
        seen["optimizer"].step()
        return seen["optimizer"].state_dict()["state"][0]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(begin, seen)
        assert "exp_avg_codes" in train()
        exec(save, seen)
        assert train()["step"] == 2
        exec(load, seen)
        assert train()["step"] == 2
    finally:
        dist.destroy_process_group()
