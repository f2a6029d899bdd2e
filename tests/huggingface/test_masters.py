"""Exact weights with transformers' own Trainer: by ``optim_args``, and out of its checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

import adamw_triton
from adamw_triton.cli import main
from tests.huggingface.tiny import VOCABULARY, arguments, llama, optimizer_of, trainer

MASTER = "master_weights=true"
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Twin(TrainerCallback):
    """The same steps in fp32, by the gradients of the model of 16 bits."""

    def __init__(self, model: Any, variant: str) -> None:
        self.params = {name: p.detach().float() for name, p in model.named_parameters()}
        self.model = model
        self.variant = variant
        self.optimizer: Any = None

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        ours = optimizer.optimizer
        names = {id(p): name for name, p in self.model.named_parameters()}
        if self.optimizer is None:
            groups = [
                {**group, "params": [self.params[names[id(p)]] for p in group["params"]]}
                for group in ours.param_groups
            ]
            self.optimizer = adamw_triton.AdamW(groups, variant=self.variant)
        for theirs, group in zip(self.optimizer.param_groups, ours.param_groups, strict=True):
            theirs["lr"] = group["lr"]
            for twin, param in zip(theirs["params"], group["params"], strict=True):
                twin.grad = None if param.grad is None else param.grad.float()
        self.optimizer.step()


def small(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return llama()
    if kind == "tied llama":
        return llama(tie_word_embeddings=True)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=32)
        )
    if kind == "bert":
        sizes = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
        }
        return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes))
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


@pytest.mark.parametrize(
    ("kind", "optim", "dtype"),
    [
        ("llama", "adamw_triton", "bf16"),
        ("llama", "paged_adamw_triton_8bit", "bf16"),
        ("llama", "adamw_triton_32bit", "fp16"),
        ("tied llama", "adamw_triton_8bit", "bf16"),
        ("gpt2", "adamw_triton_32bit", "bf16"),
        ("bert", "adamw_triton_32bit", "bf16"),
        ("t5", "adamw_triton_32bit", "bf16"),
    ],
)
def test_a_trainers_checkpoint_becomes_the_weights_in_fp32(
    kind: str, optim: str, dtype: str, tmp_path: Path
) -> None:
    model = small(kind).to(HALVES[dtype])
    twin = Twin(model, "8bit" if "8bit" in optim else "32bit")
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "learning_rate": 1e-4}
    trained = trainer(
        arguments(tmp_path, optim, optim_args=MASTER, warmup_steps=2, **saving), model, callbacks=[twin]
    )
    trained.train()
    assert optimizer_of(trained).master_weights is True
    out = tmp_path / "master.safetensors"
    assert main(["convert", str(tmp_path / "checkpoint-4"), str(out), "--to", "master"]) == 0
    found = load_file(out)
    wanted = optimizer_of(trained).master_state_dict(model)
    assert set(found) <= set(wanted)
    differing = 0
    for name, param in twin.params.items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], param), name
        assert torch.equal(found[name], wanted[name])
        differing += not torch.equal(found[name], found[name].to(HALVES[dtype]).float())
    assert differing > len(twin.params) / 2


def test_transformers_loads_what_was_converted(tmp_path: Path) -> None:
    model = llama(dtype=torch.bfloat16)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained = trainer(arguments(tmp_path, "adamw_triton_8bit", optim_args=MASTER, **saving), model)
    trained.train()
    folder = tmp_path / "checkpoint-2"
    wanted = optimizer_of(trained).master_state_dict(model)
    out = folder / "model.safetensors"  # over the weights of 16 bits
    assert main(["convert", str(folder), str(out), "--force", "--to", "master"]) == 0
    loaded = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


def test_weights_in_shards(tmp_path: Path) -> None:
    model = llama(dtype=torch.bfloat16)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained = trainer(arguments(tmp_path, "adamw_triton_8bit", optim_args=MASTER, **saving), model)
    trained.train()
    folder, out = tmp_path / "checkpoint-2", tmp_path / "master.safetensors"
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="64KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert main(["convert", str(folder), str(out), "--to", "master"]) == 0
    wanted = optimizer_of(trained).master_state_dict(model)
    found = load_file(out)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_frozen_layers_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which layers were trained, no file says: two of them have the same shapes."""
    model = llama(dtype=torch.bfloat16)
    model.model.layers[0].requires_grad_(False)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    args = arguments(tmp_path, "adamw_triton_8bit", optim_args=MASTER, **saving)
    trainer(args, model).train()
    out = tmp_path / "master.safetensors"
    assert main(["convert", str(tmp_path / "checkpoint-2"), str(out), "--to", "master"]) == 2
    said = capsys.readouterr().err
    assert "cannot be known: the optimizer has groups of [9, 3] parameters" in said
    assert "save optimizer.master_state_dict(model)" in said
    assert not out.exists()


def test_a_trainer_that_is_given_an_optimizer_of_named_parameters(tmp_path: Path) -> None:
    """Then anything may be frozen."""
    model = llama(dtype=torch.bfloat16)
    model.model.layers[0].requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = adamw_triton.AdamW(named, lr=1e-4, variant="8bit", master_weights=True)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    args = arguments(tmp_path, "adamw_torch", **saving)
    trainer(args, model, optimizers=(optimizer, None)).train()
    out = tmp_path / "master.safetensors"
    assert main(["convert", str(tmp_path / "checkpoint-2"), str(out), "--to", "master"]) == 0
    found, wanted = load_file(out), optimizer.master_state_dict(model)
    for name, value in wanted.items():
        assert found[name].dtype is value.dtype
        assert torch.equal(found[name], value), name


# --- optim_args -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "master", "stochastic"),
    [
        ("master_weights=true", True, "auto"),
        ("master_weights=False", False, "auto"),
        ("master_weights=auto,stochastic_rounding=auto", "auto", "auto"),
        ("master_weights=false, stochastic_rounding=true", False, True),
        ("block_size=256", "auto", "auto"),
    ],
)
def test_optim_args_are_typed(text: str, master: Any, stochastic: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, "adamw_triton_8bit", optim_args=text)
    optimizer: Any = trainer(args, llama(dtype=torch.bfloat16)).create_optimizer()
    assert (optimizer.master_weights, optimizer.stochastic_rounding) == (master, stochastic)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("master_weights=yes", "master_weights must be true or false or auto"),
        ("stochastic_rounding=1", "stochastic_rounding must be true or false or auto"),
        ("master_weights=true,stochastic_rounding=true", "contradict each other"),
        ("master_weight=true", "unknown key 'master_weight'"),
    ],
)
def test_wrong_optim_args_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(arguments(tmp_path, "adamw_triton_8bit", optim_args=text), llama()).train()


@pytest.mark.parametrize("optim", ["adamw_triton_32bit", "paged_adamw_triton_8bit"])
def test_a_resumed_run_has_the_same_masters(optim: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "optim_args": MASTER}
    whole = trainer(arguments(tmp_path / "whole", optim, **saving), llama(dtype=torch.bfloat16))
    whole.train()
    resumed = trainer(arguments(tmp_path / "resumed", optim, **saving), llama(seed=1, dtype=torch.bfloat16))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    found = optimizer_of(resumed).master_state_dict(resumed.model)
    wanted = optimizer_of(whole).master_state_dict(whole.model)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
