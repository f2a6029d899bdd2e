"""Training by string: transformers' own ``Trainer``, unmodified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from transformers import Trainer

import adamw_triton
from adamw_triton.huggingface import optimizer_cls_and_kwargs
from tests.huggingface.tiny import (
    VARIANTS,
    arguments,
    bits,
    is_paged,
    llama,
    losses,
    optimizer_of,
    state_bits,
    trainer,
)


@pytest.mark.parametrize("optim", VARIANTS)
def test_a_string_trains(optim: str, tmp_path: Path) -> None:
    trained = trainer(arguments(tmp_path, optim), llama())
    trained.train()
    optimizer = optimizer_of(trained)
    assert type(optimizer) is adamw_triton.AdamW
    assert optimizer.variant == VARIANTS[optim]
    assert losses(trained)[-1] < losses(trained)[0] - 0.3


def test_32_bits_follow_torchs_adamw(tmp_path: Path) -> None:
    models = []
    for optim in ("adamw_torch", "adamw_triton_32bit"):
        model = llama()
        trainer(arguments(tmp_path, optim, max_steps=20, warmup_steps=5), model).train()
        models.append(model)
    theirs, ours = (model.state_dict() for model in models)
    start = llama().state_dict()
    furthest = max((theirs[name] - ours[name]).abs().max().item() for name in theirs)
    moved = max((theirs[name] - start[name]).abs().max().item() for name in theirs)
    assert furthest <= 1e-6
    assert moved > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optim", VARIANTS)
def test_a_resumed_run_has_the_same_bits(optim: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(arguments(tmp_path / "whole", optim, **saving), llama(dtype=dtype))
    whole.train()
    resumed = trainer(arguments(tmp_path / "resumed", optim, **saving), llama(seed=1, dtype=dtype))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert bits(resumed.model) == bits(whole.model)
    assert state_bits(optimizer_of(resumed)) == state_bits(optimizer_of(whole))
    held = {dtype for _, _, dtype, _ in state_bits(optimizer_of(resumed))}
    assert ("torch.int8" in held) == ("8bit" in optim)
    assert is_paged(optimizer_of(resumed)) == optim.startswith("paged")


def test_weight_decay_spares_what_transformers_spares(tmp_path: Path) -> None:
    model = llama()
    optimizer = trainer(arguments(tmp_path, "adamw_triton_8bit"), model).create_optimizer()
    names = {id(param): name for name, param in model.named_parameters()}
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-2] for p in spared["params"]} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_training_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        "paged_adamw_triton_8bit",
        learning_rate=2e-4,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        optim_args="memory_budget=4GiB, block_size=256",
    )
    optimizer: Any = trainer(args, llama()).create_optimizer()
    assert (optimizer.memory_budget, optimizer.block_size, optimizer.variant) == ("4GiB", 256, "paged_8bit")
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.8, 0.95), 1e-6)


def test_a_wrong_argument_is_named_before_training(tmp_path: Path) -> None:
    wrong = trainer(arguments(tmp_path, "adamw_triton_8bit", optim_args="block_size=100"), llama())
    with pytest.raises(ValueError, match="Invalid block_size: 100; it must be 128 or 256"):
        wrong.train()
    wrong = trainer(arguments(tmp_path, "adamw_triton_8bit", optim_args="betas=0.5"), llama())
    with pytest.raises(ValueError, match=r"betas=0\.5 does not belong there: set adam_beta1 and adam_beta2"):
        wrong.train()


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_the_official_way_gives_the_same_bits(variant: str, tmp_path: Path) -> None:
    optim = next(name for name, stands_for in VARIANTS.items() if stands_for == variant)
    by_string = trainer(arguments(tmp_path, optim, optim_args="block_size=256"), llama())
    args = arguments(tmp_path, "adamw_torch")
    pair = optimizer_cls_and_kwargs(args, variant=variant, block_size=256)
    by_pair = trainer(args, llama(), optimizer_cls_and_kwargs=pair)
    for each in (by_string, by_pair):
        each.train()
    assert optimizer_of(by_pair).variant == variant
    assert bits(by_pair.model) == bits(by_string.model)


def test_the_model_card_names_it(tmp_path: Path) -> None:
    trained = trainer(arguments(tmp_path, "paged_adamw_triton_8bit"), llama())
    trained.train()
    trained.create_model_card(model_name="tiny", dataset="numbers")
    assert "PAGED_ADAMW_TRITON_8BIT" in (tmp_path / "README.md").read_text()


def test_without_a_model_as_other_tools_call_it(tmp_path: Path) -> None:
    args = arguments(tmp_path, "paged_adamw_triton_32bit")
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert (cls, kwargs["variant"]) == (adamw_triton.AdamW, "paged_32bit")
    assert Trainer.get_optimizer_cls_and_kwargs(args=args, model=llama()) == (cls, kwargs)


def test_other_optimizers_are_left_to_transformers(tmp_path: Path) -> None:
    cls, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, "adamw_torch"))
    assert cls is torch.optim.AdamW
    cls, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, "sgd", optim_args="momentum=0.5"))
    assert cls is torch.optim.SGD


def test_gradient_checkpointing_and_accumulation(tmp_path: Path) -> None:
    """Eight rows at once, or two at a time and recomputed: nearly the same gradients, so nearly the same
    weights."""
    whole = trainer(arguments(tmp_path, "adamw_triton_8bit", per_device_train_batch_size=8), llama())
    saving = arguments(
        tmp_path,
        "adamw_triton_8bit",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
    )
    pieces = trainer(saving, llama())
    for each in (whole, pieces):
        each.train()
    assert pieces.state.global_step == whole.state.global_step == 6
    torch.testing.assert_close(losses(pieces), losses(whole), rtol=1e-2, atol=1e-2)
