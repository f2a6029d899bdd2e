"""``torch.distributed.checkpoint``: state by the names of a model's parameters, to a folder and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from adamw_triton import AdamW
from tests.optimizer.problems import bits, state_bits, train

VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")

# There is no process group: torch says so each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def model_and_optimizer(variant: str, seed: int = 0) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 80), nn.LayerNorm(80), nn.Linear(80, 64))
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "lr": 1e-2}, {"params": others, "weight_decay": 0.0}]
    return model, AdamW(groups, variant=variant)


@pytest.mark.parametrize(
    "options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}], ids=str
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_get_and_set(variant: str, options: dict[str, Any]) -> None:
    model, optimizer = model_and_optimizer(variant)
    train(optimizer, 3)
    state_dict = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
    assert any("0.weight" in name for name in (state_dict if len(state_dict) > 2 else state_dict["state"]))
    twin, other = model_and_optimizer(variant, seed=1)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state_dict, options=StateDictOptions(**options))
    assert state_bits(other) == state_bits(optimizer)
    assert [g["lr"] for g in other.param_groups] == [1e-2, 1e-3]
    assert bits(train(other, 2, first=4)) == bits(train(optimizer, 2, first=4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_to_a_folder_and_back(variant: str, tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(variant)
    train(optimizer, 3)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    twin, other = model_and_optimizer(variant, seed=1)
    twin.load_state_dict(model.state_dict())
    loaded = {"optimizer": get_optimizer_state_dict(twin, other)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(twin, other, loaded["optimizer"])
    assert state_bits(other) == state_bits(optimizer)
    assert bits(train(other, 2, first=4)) == bits(train(optimizer, 2, first=4))
