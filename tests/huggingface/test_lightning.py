"""Lightning: fit, checkpoint, fit again, with the moves it makes of optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
lightning: Any = pytest.importorskip("lightning")

import torch
from torch.utils.data import DataLoader

import adamw_triton
from tests.huggingface.tiny import VARIANTS, bits, is_paged, llama, state_bits, tokens


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, variant: str, seed: int) -> None:
        super().__init__()
        self.model = llama(seed)
        self.variant = variant

    def training_step(self, batch: Any, _: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        optimizer = adamw_triton.AdamW(self.parameters(), lr=3e-3, variant=self.variant)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: Module, epochs: int, folder: Path, resume: Path | None = None) -> Any:
    """Epochs of three steps."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer.fit(
        module, DataLoader(tokens(12), batch_size=4), ckpt_path=None if resume is None else str(resume)
    )
    return trainer


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_fit_checkpoint_fit(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Module(variant, seed=0)
    optimizer_of_whole = fit(whole, 2, tmp_path).optimizers[0]
    half = fit(Module(variant, seed=0), 1, tmp_path)
    half.save_checkpoint(tmp_path / "half.ckpt")

    moved = []

    def to_another_device(value: torch.Tensor, _: torch.device) -> torch.Tensor:
        moved.append(value)
        return value.clone()  # a move from the CPU to the CPU would give back the same tensor

    monkeypatch.setattr("lightning.fabric.utilities.optimizer.move_data_to_device", to_another_device)
    resumed = Module(variant, seed=1)
    optimizer = fit(resumed, 2, tmp_path, resume=tmp_path / "half.ckpt").optimizers[0]
    assert moved
    assert bits(resumed) == bits(whole)
    assert state_bits(optimizer) == state_bits(optimizer_of_whole)
    assert is_paged(optimizer) == variant.startswith("paged")
