"""accelerate with its FSDP2 plugin: parameters are swapped, trained, saved, loaded, and training goes on."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from torch.distributed.tensor import DTensor

from tests.distributed import accelerating
from tests.distributed.once import once
from tests.distributed.ranks import together
from tests.distributed.training import batch, local, weights

pytestmark = pytest.mark.slow

SHARDED: dict[str, Any] = {"state_dict_type": "SHARDED_STATE_DICT"}
FULL: dict[str, Any] = {"state_dict_type": "FULL_STATE_DICT"}
EFFICIENT: dict[str, Any] = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
"""As ``accelerate config`` proposes: parameters pass by the meta device."""
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": accelerating.LAYER, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip
"""What ``accelerate launch`` makes of a config file."""

CASES: dict[str, tuple[dict[str, Any], torch.dtype, dict[str, Any] | None, str]] = {
    "paged_8bit": ({"variant": "paged_8bit"}, torch.float32, SHARDED, "no"),
    "8bit in one file": ({"variant": "8bit"}, torch.float32, FULL, "no"),
    "auto by the environment": ({}, torch.float32, None, "no"),
    "by the meta device": ({"variant": "paged_8bit"}, torch.float32, EFFICIENT, "no"),
    "exact": ({"variant": "paged_8bit", "master_weights": True}, torch.bfloat16, SHARDED, "no"),
    "upcast": ({"variant": "paged_8bit", "master_weights": True}, torch.bfloat16, SHARDED, "bf16"),
}


def trained(parts: tuple[Any, Any, Any], steps: range) -> list[float]:
    accelerator, model, optimizer = parts
    losses = []
    for step in steps:
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        accelerator.backward(loss)
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def state(optimizer: Any) -> dict[str, torch.Tensor]:
    """This rank's, by parameter and name."""
    entries = optimizer.optimizer.state_dict()["state"].items()
    return {
        f"{index}.{key}": local(value).clone() for index, entry in entries for key, value in entry.items()
    }


def saved_and_loaded(folder: str) -> dict[str, Any]:
    accelerating.pretend()
    os.environ |= LAUNCHED
    return {name: _of_one(f"{folder}/{name}", *case) for name, case in CASES.items()}


def _of_one(folder: str, *case: Any) -> dict[str, Any]:
    whole = accelerating.accelerated(*case)
    ours = [param for group in whole[2].param_groups for param in group["params"]]
    swapped = list(map(id, ours)) == list(map(id, whole[1].parameters()))
    sharded = all(isinstance(param, DTensor) for param in ours)
    before = trained(whole, range(3))
    whole[0].save_state(folder)
    after = trained(whole, range(3, 6))
    resumed = accelerating.accelerated(*case)
    resumed[0].load_state(folder)
    decided = resumed[2].optimizer.plan is not None
    return {
        "swapped": swapped and sharded and whole[0].is_fsdp2,
        "decided": decided,
        "losses": (before, after, trained(resumed, range(3, 6))),
        "weights": (weights(whole[1]), weights(resumed[1])),
        "state": (state(whole[2]), state(resumed[2])),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both ranks: all cases in the same processes."""
    return once(tmp_path_factory, "accelerate", lambda folder: together(2, saved_and_loaded, str(folder)))


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_it_goes_on_with_the_same_bits(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        case = rank[name]
        assert case["swapped"], "the optimizer has the model's shards"
        before, after, resumed = case["losses"]
        assert after == resumed
        assert before[0] > 5, "nothing is learnt yet"
        for whole, again in (case["weights"], case["state"]):
            assert whole.keys() == again.keys()
            assert all(torch.equal(whole[key], again[key]) for key in whole)
        assert any(key.endswith("codes") for key in case["state"][0]) == ("auto" not in name)


def test_loading_does_not_decide_where_state_goes(found: list[dict[str, Any]]) -> None:
    """torch.distributed.checkpoint takes a step on zero gradients first, to see what state there is."""
    assert not any(rank["auto by the environment"]["decided"] for rank in found)


def test_weights_that_accelerate_has_made_fp32_have_no_remainder(found: list[dict[str, Any]]) -> None:
    for rank in found:
        held = {name: {key.split(".")[1] for key in rank[name]["state"][0]} for name in ("exact", "upcast")}
        dtypes = {
            name: {weight.dtype for weight in rank[name]["weights"][0].values()}
            for name in ("exact", "upcast")
        }
        assert dtypes == {"exact": {torch.bfloat16}, "upcast": {torch.float32}}
        assert held["exact"] - held["upcast"] == {"remainder"}
