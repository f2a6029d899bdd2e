"""Gradient release in an unmodified Trainer: the run without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import transformers

from adamw_triton.huggingface import ReportCallback
from adamw_triton.state import placement
from tests.huggingface.tiny import arguments, bits, llama, losses, optimizer_of, trainer

BUCKET = 30_000


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "BUCKET_BYTES", BUCKET)


def trained(folder: Path, optim_args: str, resume: Any = None, **changes: Any) -> Any:
    settings = {"max_grad_norm": 0, "optim_args": optim_args, "gradient_accumulation_steps": 4, **changes}
    run = trainer(
        arguments(folder, "paged_adamw_triton_8bit", **settings),
        llama(dtype=torch.bfloat16, tie_word_embeddings=True),
        callbacks=[ReportCallback()],
    )
    run.train(resume_from_checkpoint=resume)
    return run


EXACT = "master_weights=true,max_grad_norm=inf"


def test_loss_bits_and_norm_of_a_run_without(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", EXACT)
    released = trained(tmp_path / "released", "master_weights=true,gradient_release=true")
    assert bits(plain.model) == bits(released.model)
    assert losses(plain) == losses(released)
    norms = [
        [entry["grad_norm"] for entry in run.state.log_history if "loss" in entry]
        for run in (plain, released)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert min(norms[1]) > 0
    assert optimizer_of(released)._release is not None


def test_resumed_to_the_bit(tmp_path: Path) -> None:
    release = "master_weights=true,gradient_release=true"
    whole = trained(tmp_path, release, save_strategy="steps", save_steps=3)
    resumed = trained(tmp_path / "again", release, resume=str(tmp_path / "checkpoint-3"))
    assert bits(whole.model) == bits(resumed.model)


def test_few_gradients_are_alive_and_none_is_left(tmp_path: Path) -> None:
    run = trainer(
        arguments(tmp_path, "adamw_triton_8bit", max_grad_norm=0, optim_args="gradient_release=true"), llama()
    )
    run.create_optimizer()
    params, alive = list(run.model.parameters()), []

    def note(_: torch.Tensor) -> None:
        alive.append(sum(p.grad.nbytes for p in params if p.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(note)
    run.train()
    assert max(alive) <= 2 * BUCKET + max(p.nbytes for p in params)
    assert sum(p.nbytes for p in params) > 4 * BUCKET
    assert all(p.grad is None for p in params)


def test_the_trainers_own_limit_gets_one_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trained(tmp_path, "gradient_release=true", max_grad_norm=1.0, max_steps=2)
    said = [str(each.message) for each in seen if "max_grad_norm" in str(each.message)]
    assert len(said) == 1
    assert "clips at most what is left over for step(), by the norm of that" in said[0]


HOST = "master_weights=true,gradient_release=true,accumulate_on=host"


def test_micro_batches_that_add_up_on_the_host(tmp_path: Path) -> None:
    """As those of a run without release, and of one that goes on after a checkpoint."""
    plain = trained(tmp_path / "plain", EXACT)
    params: list[torch.nn.Parameter] = []
    alive: list[int] = []

    def note(_: torch.Tensor) -> None:
        alive.append(sum(p.grad.nbytes for p in params if p.grad is not None))

    run = trainer(
        arguments(
            tmp_path / "host", "paged_adamw_triton_8bit", max_grad_norm=0, optim_args=HOST,
            gradient_accumulation_steps=4, save_strategy="steps", save_steps=3,
        ),
        llama(dtype=torch.bfloat16, tie_word_embeddings=True),
        callbacks=[ReportCallback()],
    )  # fmt: skip
    run.create_optimizer()
    params += run.model.parameters()
    for param in params:
        param.register_post_accumulate_grad_hook(note)
    run.train()
    assert bits(plain.model) == bits(run.model)
    assert losses(plain) == losses(run)
    assert max(alive) <= 2 * BUCKET + max(p.nbytes for p in params)
    assert sum(p.nbytes for p in params) > 1.5 * max(alive)
    assert optimizer_of(run).memory()["sums"] >= sum(p.nbytes for p in params)
    resumed = trained(tmp_path / "again", HOST, resume=str(tmp_path / "host" / "checkpoint-3"))
    assert bits(resumed.model) == bits(run.model)


def test_sums_of_fp32(tmp_path: Path) -> None:
    """Other bits than those that are rounded in each addition."""
    runs = [
        trained(tmp_path / str(n), f"{HOST}{more}")
        for n, more in enumerate(("", ",accumulate_dtype=float32"))
    ]
    sums = [optimizer_of(run).memory()["sums"] for run in runs]
    assert sums[1] == 2 * sums[0]
    assert bits(runs[0].model) != bits(runs[1].model)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["gpu", "host"])
def test_sft_of_twenty_steps_of_four_batches(where: str, tmp_path: Path) -> None:
    """As without release; and if it is stopped in the middle and goes on."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.huggingface.test_peft_and_trl import TEXTS, tokenizer

    class Killed(BaseException):
        pass

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 13:
                raise Killed

    def sft(folder: str, optim_args: str, stop: bool = False, resume: Any = None) -> Any:
        args = trl.SFTConfig(
            str(tmp_path / folder), optim="paged_adamw_triton_8bit", optim_args=optim_args, max_steps=20,
            gradient_accumulation_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
            max_grad_norm=0, logging_steps=1, save_strategy="steps", save_steps=10, report_to=[],
            use_cpu=True, bf16=False,
        )  # fmt: skip
        run = trl.SFTTrainer(
            model=llama(dtype=torch.bfloat16),
            args=args,
            train_dataset=datasets.Dataset.from_list([{"text": text} for text in TEXTS] * 8),
            processing_class=tokenizer(),
            callbacks=[Stop()] if stop else [],
        )
        run.train(resume_from_checkpoint=resume)
        return run

    release = f"master_weights=true,gradient_release=true,accumulate_on={where}"
    plain, released = sft("plain", "master_weights=true"), sft("released", release)
    assert len(losses(plain)) == 20
    assert losses(released) == losses(plain)
    assert bits(released.model) == bits(plain.model)
    with pytest.raises(Killed):
        sft("stopped", release, stop=True)
    resumed = sft("stopped", release, resume=str(tmp_path / "stopped" / "checkpoint-10"))
    assert bits(resumed.model) == bits(plain.model)
