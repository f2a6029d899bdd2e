"""LoRA, LoRA+, a model as QLoRA has it, and TRL's trainer and parser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

import adamw_triton
from tests.huggingface.test_launcher import launch
from tests.huggingface.tiny import (
    VARIANTS,
    arguments,
    bits,
    llama,
    losses,
    optimizer_of,
    state_bits,
    trainer,
)

optims = pytest.mark.parametrize("optim", VARIANTS)
LORA: dict[str, Any] = {"r": 64, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@optims
def test_lora_has_a_group_without_parameters(optim: str, tmp_path: Path) -> None:
    """Adapters have no biases and norms, so nothing that weight decay spares."""
    trained = trainer(arguments(tmp_path, optim), get_peft_model(llama(), LoraConfig(**LORA)))
    frozen = {name: value for name, value in bits(trained.model).items() if "lora" not in name}
    trained.train()
    assert [len(group["params"]) for group in optimizer_of(trained).param_groups] == [8, 0]
    assert len(optimizer_of(trained).state) == 8
    assert losses(trained)[-1] < losses(trained)[0]
    after = bits(trained.model)
    assert {name: after[name] for name in frozen} == frozen


def test_lora_plus_wants_no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = get_peft_model(llama(), LoraConfig(**LORA))
    ratio: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 16}
    optimizer = create_loraplus_optimizer(model, adamw_triton.AdamW, variant="paged_8bit", **ratio)
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 16e-3}
    rows = torch.arange(16)[None]
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    named_like_theirs = type("PagedAdamW8bit", (adamw_triton.AdamW,), {})
    with pytest.raises(ImportError, match="bitsandbytes"):
        create_loraplus_optimizer(model, named_like_theirs, **ratio)


def quantized(folder: Path) -> Any:
    """A frozen base in 4 bits, adapters in fp32, and the head trained in bf16."""
    if not folder.exists():
        llama(dtype=torch.bfloat16).save_pretrained(folder)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit, device_map="cpu")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    for name, param in model.named_parameters():
        if "modules_to_save" in name:
            param.data = param.data.to(torch.bfloat16)
    return model


@optims
def test_qlora_mixes_dtypes_and_resumes(optim: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "bf16": True}
    whole = trainer(arguments(tmp_path / "whole", optim, **saving), quantized(tmp_path / "base"))
    (decayed,) = (group["params"] for group in whole.create_optimizer().param_groups if group["params"])
    assert {param.dtype for param in decayed} == {torch.float32, torch.bfloat16}
    assert {str(param.dtype) for param in whole.model.parameters()} >= {"torch.uint8"}
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    resumed = trainer(arguments(tmp_path / "resumed", optim, **saving), quantized(tmp_path / "base"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert bits(resumed.model) == bits(whole.model)
    assert state_bits(optimizer_of(resumed)) == state_bits(optimizer_of(whole))


# --- TRL -----------------------------------------------------------------------------------------------

TEXTS = ["one two three four five six", "two four six eight ten", "three six nine twelve"] * 8


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "<eos>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


@optims
def test_sft_with_lora_by_string(optim: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        optim=optim,
        optim_args="block_size=256",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trained = trl.SFTTrainer(
        model=llama(),
        args=args,
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
    )
    trained.train()
    optimizer = optimizer_of(trained)
    assert (type(optimizer), optimizer.variant) == (adamw_triton.AdamW, VARIANTS[optim])
    assert losses(trained)[-1] < losses(trained)[0]


@optims
@pytest.mark.parametrize("kind", ["words", "yaml"])
def test_trls_parser(kind: str, optim: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    file = tmp_path / "sft.yaml"
    file.write_text(f"output_dir: {tmp_path}\noptim: {optim}\noptim_args: block_size=256\nbf16: false\n")
    words = ["--output_dir", str(tmp_path), "--optim", optim, "--bf16", "false"]
    if kind == "yaml":
        words = ["--config", str(file)]
    (args,) = trl.TrlParser((trl.SFTConfig,)).parse_args_and_config(words)
    assert args.optim.value == optim
    if kind == "yaml":
        assert args.optim_args == "block_size=256"


@pytest.mark.slow
def test_trls_own_script_through_our_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    rows = "".join(f'{{"text": "{text}"}}\n' for text in TEXTS)
    (data / "train.jsonl").write_text(rows)
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    words = ["-m", "trl.scripts.sft", "--model_name_or_path", str(tmp_path / "model")]
    words += ["--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    words += ["--use_cpu", "--bf16", "false", "--report_to", "none", "--optim", "paged_adamw_triton_8bit"]
    launch(monkeypatch, *words)
    saved = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert any(value.dtype is torch.int8 for entry in saved["state"].values() for value in entry.values())
