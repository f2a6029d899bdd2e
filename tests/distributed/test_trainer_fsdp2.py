"""transformers' Trainer with FSDP2: trained, saved, resumed on as many ranks and on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from torch.distributed.tensor import DTensor

from tests.distributed import accelerating
from tests.distributed.once import once
from tests.distributed.ranks import together
from tests.distributed.training import llama, local, weights
from tests.huggingface.tiny import arguments, losses, optimizer_of, trainer

pytestmark = pytest.mark.slow

KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
"""One file of rank 0, and torch.distributed.checkpoint's folder."""


def made(folder: str, kind: str, rows: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config = {"version": 2, "state_dict_type": kind}
    settings = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": rows}
    args = arguments(
        Path(folder), "paged_adamw_triton_8bit", fsdp=True, fsdp_config=config, **{**settings, **changes}
    )
    return trainer(args, llama(dtype))


def ran(trained: Any, checkpoint: str | None = None) -> dict[str, Any]:
    trained.train(resume_from_checkpoint=checkpoint)
    optimizer = optimizer_of(trained)
    entries = optimizer.state_dict()["state"].items()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        "losses": losses(trained),
        "norms": [entry["grad_norm"] for entry in trained.state.log_history if "grad_norm" in entry],
        "weights": weights(trained.model),
        "state": {f"{at}.{key}": local(value) for at, entry in entries for key, value in entry.items()},
        "sharded": all(isinstance(param, DTensor) for param in params),
        "norm": optimizer.grad_norm,
        "on the host": optimizer.memory()["host"] > 0,
    }


def on_two(folder: str) -> dict[str, Any]:
    accelerating.pretend()
    found: dict[str, Any] = {"folder": folder}
    for kind in KINDS:
        whole = made(f"{folder}/{kind}", kind)
        found[kind] = {"whole": ran(whole)}
        whole.save_model(f"{folder}/{kind}/final")
        resumed = made(f"{folder}/{kind}-resumed", kind, save_strategy="no")
        found[kind]["resumed"] = ran(resumed, f"{folder}/{kind}/checkpoint-3")
    quiet: dict[str, Any] = {"save_strategy": "no", "max_steps": 3}
    for name, changes in {
        "clipped by the Trainer": {"max_grad_norm": 0.5},
        "clipped by us": {"max_grad_norm": 0.0, "optim_args": "max_grad_norm=0.5"},
        "bf16=True": {"dtype": torch.bfloat16, "bf16": True, "optim_args": "master_weights=true"},
    }.items():
        found[name] = ran(made(f"{folder}/{name}", KINDS[0], **quiet, **changes))
    quiet |= {"max_grad_norm": 0.0, "optim_args": "gradient_release=true"}
    try:
        ran(made(f"{folder}/released", KINDS[0], **quiet))
    except Exception as error:
        found["release"] = str(error)
    return found


def on_one(folder: str) -> dict[str, Any]:
    """As many rows a step as two have."""
    accelerating.pretend()
    return {
        kind: ran(
            made(f"{folder}/{kind}-alone", kind, rows=4, save_strategy="no"), f"{folder}/{kind}/checkpoint-3"
        )
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of rank 0: all in the same processes."""
    return once(tmp_path_factory, "trainer", lambda folder: together(2, on_two, str(folder))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_bits(kind: str, found: dict[str, Any]) -> None:
    whole, resumed = found[kind]["whole"], found[kind]["resumed"]
    assert whole["sharded"]
    assert whole["on the host"]
    assert len(whole["losses"]) == 6
    assert whole["losses"][-1] < whole["losses"][0] - 0.3
    assert resumed["losses"] == whole["losses"]
    for part in ("weights", "state"):
        assert resumed[part].keys() == whole[part].keys()
        assert all(torch.equal(resumed[part][key], whole[part][key]) for key in whole[part])
    assert any(key.endswith("codes") for key in resumed["state"])


def test_resumed_by_one_process(found: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its gradients are summed in another order."""
    (alone,) = once(tmp_path_factory, "alone", lambda _: together(1, on_one, found["folder"]))
    for kind in KINDS:
        whole = found[kind]["whole"]
        assert len(alone[kind]["losses"]) == 6
        torch.testing.assert_close(alone[kind]["losses"], whole["losses"], rtol=0, atol=1e-3)


def test_the_final_save_loads(found: dict[str, Any]) -> None:
    from transformers import LlamaForCausalLM

    loaded = weights(LlamaForCausalLM.from_pretrained(Path(found["folder"], KINDS[0], "final")))
    trained = found[KINDS[0]]["whole"]["weights"]
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


def test_clipping_is_by_the_norm_over_all_ranks(found: dict[str, Any]) -> None:
    theirs, ours = found["clipped by the Trainer"], found["clipped by us"]
    assert min(theirs["norms"]) > 1, "all are clipped"
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=0, atol=1e-4)
    torch.testing.assert_close(float(ours["norm"]), theirs["norms"][-1], rtol=1e-5, atol=0)


def test_bf16_true_trains_in_fp32_without_remainders(found: dict[str, Any]) -> None:
    upcast = found["bf16=True"]
    assert {weight.dtype for weight in upcast["weights"].values()} == {torch.float32}
    assert not [key for key in upcast["state"] if "remainder" in key]


def test_gradient_release_is_refused(found: dict[str, Any]) -> None:
    assert "gradient_release=True is for one process, and there are 2" in found["release"]
