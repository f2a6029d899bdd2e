"""What steps did, in the logs of a real Trainer and of Lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from torch.utils.data import DataLoader

import adamw_triton
from adamw_triton.huggingface import ReportCallback
from adamw_triton.monitoring import grouped
from adamw_triton.telemetry.observed import METRICS
from tests.huggingface.tiny import arguments, llama, optimizer_of, tokens, trainer

NAMES = {f"optim/{name}" for name in ("step", *METRICS)}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of all that a SummaryWriter left there."""
    reading: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = folder.rglob("events.out.tfevents.*")
    read = reading.EventAccumulator(str(events)).Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.mark.parametrize("per_param", [False, True])
def test_a_trainer_that_reports_to_tensorboard_shows_them(per_param: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    args = arguments(
        tmp_path, "adamw_triton_8bit", logging_steps=2, report_to="tensorboard", optim_args="telemetry=true"
    )
    trained = trainer(args, llama())
    ReportCallback.attach(trained, per_param=per_param)
    trained.train()
    found = scalars(tmp_path)
    assert {f"train/{name}" for name in NAMES} <= found.keys()
    assert found["train/optim/step"] == [(2, 2), (4, 4), (6, 6)]
    last = {tag: values[-1][1] for tag, values in found.items()}
    for name, value in grouped(optimizer_of(trained).stats(per_param=per_param, model=trained.model)).items():
        assert last[f"train/{name}"] == pytest.approx(value, rel=1e-6), name
    of_one = {tag for tag in found if tag.startswith("train/optim_grad_norm/")}
    weights = {f"train/optim_grad_norm/{name}" for name, _ in trained.model.named_parameters()}
    assert of_one == (weights if per_param else set())


@pytest.mark.parametrize("telemetry", ["false", "4"])
def test_what_has_not_been_looked_at_is_not_logged(telemetry: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, "adamw_triton_8bit", logging_steps=2, optim_args=f"telemetry={telemetry}")
    trained = trainer(args, llama(), callbacks=[ReportCallback()])
    trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    steps = [entry.get("optim/step") for entry in entries]
    assert steps == ([None, 4, 4] if telemetry == "4" else [None] * 3)
    for entry, step in zip(entries, steps, strict=True):
        assert (entry.keys() >= NAMES) == (step is not None)
        assert "optimizer_bytes/host" in entry


@pytest.mark.parametrize(
    ("optimizers", "accumulate", "names"),
    [
        (1, 1, NAMES),
        (1, 2, NAMES),
        (2, 1, {name.replace("optim", f"optim{i}") for i in (0, 1) for name in NAMES}),
    ],
)
def test_lightning(optimizers: int, accumulate: int, names: set[str], tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning")
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    from adamw_triton.monitoring.lightning import StatsCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = optimizers == 1
            self.model = llama()

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.model(**batch).loss
            if not self.automatic_optimization:
                ours = self.optimizers()
                self.manual_backward(loss)
                for each in ours:
                    each.step()
                    each.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            params = list(self.parameters())
            return [
                adamw_triton.AdamW(params[i::optimizers], lr=1e-3, variant="8bit", telemetry=True)
                for i in range(optimizers)
            ]

    module = Module()
    running = lightning.Trainer(
        max_steps=6 * optimizers,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path),
        callbacks=[StatsCallback(per_param=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    running.fit(module, DataLoader(tokens(64), batch_size=4))
    found = scalars(tmp_path)
    assert names <= found.keys()
    for index, optimizer in enumerate(running.optimizers):
        group = "optim" if optimizers == 1 else f"optim{index}"
        assert found[f"{group}/step"] == [(1, 2), (3, 4), (5, 6)]  # Lightning counts from 0
        for name, value in grouped(optimizer.stats(per_param=True, model=module), group).items():
            assert found[name][-1][1] == pytest.approx(value, rel=1e-6), name
        for name in names & grouped(optimizer.stats(), group).keys():
            assert torch.isfinite(running.callback_metrics[name])
