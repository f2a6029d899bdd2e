"""What the callback reports, through a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from transformers import TrainerCallback

import adamw_triton
from adamw_triton.huggingface import ReportCallback
from tests.huggingface.tiny import arguments, llama, optimizer_of, trainer


class Seen(TrainerCallback):
    """Stands where W&B's callback stands."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def test_memory_by_place_is_in_every_log(tmp_path: Path) -> None:
    args = arguments(tmp_path, "paged_adamw_triton_8bit", logging_steps=2)
    trained = trainer(args, llama(), callbacks=[ReportCallback()])
    trained.train()
    at_steps = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in at_steps] == [2, 4, 6]
    memory = optimizer_of(trained).memory()
    assert memory["host"] > 0
    for entry in at_steps:
        assert entry["optimizer_bytes/host"] == memory["host"]
        assert entry["optimizer_bytes/gpu"] == memory["gpu"]
    assert at_steps[-1]["optimizer_bytes/staging"] == memory["staging"]


def test_the_norm_that_was_clipped(tmp_path: Path) -> None:
    """And what was skipped, in place of the Trainer's own number."""
    args = arguments(
        tmp_path, "adamw_triton_8bit", logging_steps=1, optim_args="max_grad_norm=1e-3,nonfinite=skip",
        max_grad_norm=0,
    )  # fmt: skip
    trained = trainer(args, llama(), callbacks=[ReportCallback()])
    norms = []
    step = adamw_triton.AdamW.step

    def noted(self: adamw_triton.AdamW, *rest: Any) -> Any:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if len(norms) == 2:
            params[0].grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
        norms.append(float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params]))))  # type: ignore[union-attr]
        return step(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw_triton.AdamW, "step", noted)
        trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert len(entries) == len(norms) == 6
    assert [entry["grad_norm"] for entry in entries] == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert [entry["skipped_steps"] for entry in entries] == [0, 0, 1, 1, 1, 1]


def test_the_norm_before_the_trainer_clipped_is_left_alone(tmp_path: Path) -> None:
    logged = []
    for callbacks in ([], [ReportCallback()]):
        args = arguments(
            tmp_path, "adamw_triton_8bit", logging_steps=1, optim_args="nonfinite=skip", max_grad_norm=1e-3
        )
        trained = trainer(args, llama(), callbacks=callbacks)
        trained.train()
        logged.append([entry["grad_norm"] for entry in trained.state.log_history if "loss" in entry])
    assert logged[0] == logged[1]
    assert min(logged[0]) > 2e-3


@pytest.mark.parametrize("attached", [True, False])
def test_attached_it_is_before_the_callbacks_that_send_logs_away(attached: bool, tmp_path: Path) -> None:
    seen = Seen()
    after = [] if attached else [ReportCallback()]
    trained = trainer(arguments(tmp_path, "adamw_triton_8bit"), llama(), callbacks=[seen, *after])
    if attached:
        assert isinstance(ReportCallback.attach(trained), ReportCallback)
    trained.train()
    assert len(seen.logs) == 7
    assert all(("optimizer_bytes/host" in logs) == attached for logs in seen.logs[:6])
    assert "train_loss" in seen.logs[6]
    assert "optimizer_bytes/host" not in seen.logs[6]


class Planned(adamw_triton.AdamW):
    """Makes a plan at the first step and another at the fourth."""

    @property
    def plan(self) -> str | None:
        steps = max((int(entry["step"]) for entry in self.state.values()), default=0)
        return f"plan {1 if steps < 4 else 2} of this run" if steps else None

    @plan.setter
    def plan(self, _: object) -> None:
        pass


def test_each_plan_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    args = arguments(tmp_path, "adamw_triton")
    optimizer = Planned(model.parameters(), lr=1e-3)
    trainer(args, model, callbacks=[ReportCallback()], optimizers=(optimizer, None)).train()
    printed = capsys.readouterr().out
    assert [printed.count(f"plan {number} of this run") for number in (1, 2)] == [1, 1]
    assert printed.index("plan 1 of this run") < printed.index("'loss'")


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    trained = trainer(arguments(tmp_path, "adamw_torch"), llama(), callbacks=[ReportCallback()])
    trained.train()
    assert not any("optimizer_bytes/host" in entry for entry in trained.state.log_history)
