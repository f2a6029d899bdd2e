"""What a page's blocks are there to show comes out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adamw_triton
from tests.docs import given
from tests.docs.pages import ROOT, blocks


def code(page: str, index: int = 0) -> str:
    return [each.text for each in blocks(ROOT / "docs" / page) if each.kind == "python"][index]


def test_bf16_without_lost_updates() -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(80, 80), "norm": nn.LayerNorm(80)}).bfloat16()
    seen: dict[str, Any] = {"adamw_triton": adamw_triton, "model": model}
    exec(code("guides/bf16.md"), seen)
    optimizer, masters = seen["optimizer"], seen["masters"]
    assert isinstance(optimizer, adamw_triton.AdamW)
    assert isinstance(masters, dict)
    assert optimizer.variant == "paged_8bit"
    assert all(value.dtype is torch.float32 for value in masters.values())


def test_the_first_loop_trains() -> None:
    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x).square().sum()

    model = Model(3, 3)
    before = model.weight.detach().clone()
    text = code("start.md").replace(".loss", "")
    exec(text, {"model": model, "batches": [{"x": torch.ones(2, 3)}] * 2})
    assert not torch.equal(model.weight, before)


def test_what_is_diagnosed() -> None:
    page = ROOT / "docs" / "guides" / "monitoring.md"
    (shown,) = [each.text for each in blocks(page) if each.kind == "text"]
    seen: dict[str, Any] = {"torch": torch, "AdamW": adamw_triton.AdamW}
    exec(code("guides/monitoring.md", -1), seen)
    # Figures may end otherwise on another machine.
    assert words(str(seen["report"])) == words(shown)


def words(text: str) -> list[str]:
    return re.sub(r"\d\S*", "#", text).split()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would shard on the GPU, without NCCL")
def test_more_than_one_gpu(tmp_path: Path) -> None:
    """Saved, and loaded, between steps."""
    begin, save, load = code("guides/fsdp2.md").replace("checkpoint-100", str(tmp_path)).split("...\n")
    with given.one_rank() as seen:
        seen["adamw_triton"] = adamw_triton

        def train() -> dict[str, Any]:
            seen["model"](torch.ones(2, 128)).sum().backward()
            seen["optimizer"].step()
            found: dict[str, Any] = seen["optimizer"].state_dict()["state"][0]
            return found

        exec(begin, seen)
        assert "exp_avg_codes" in train()
        exec(save, seen)
        assert train()["step"] == 2
        exec(load, seen)
        assert train()["step"] == 2
