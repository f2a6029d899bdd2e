"""A callback for Lightning that logs what steps did."""

from __future__ import annotations

from typing import Any

from adamw_triton.monitoring.names import GROUP, grouped
from adamw_triton.optimizer import AdamW

try:
    from lightning.pytorch import Callback
except ImportError:  # the same under its older name
    from pytorch_lightning import Callback


class StatsCallback(Callback):
    """Every ``log_every_n_steps`` steps of a ``Trainer(callbacks=[StatsCallback()])``, logs what each AdamW
    with ``telemetry`` last did, to all loggers and into ``trainer.callback_metrics``: ``optim/grad_norm`` and
    so on; of several optimizers ``optim0/grad_norm``, ``optim1/grad_norm``. It waits for the step.

    Args:
        per_param: also of every parameter, ``optim_grad_norm/<name>``.
    """

    def __init__(self, per_param: bool = False) -> None:
        self._per_param = per_param
        self._logged = 0
        """The last step after which there was something to log."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        step = trainer.global_step
        if step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step
        ours = [each for each in trainer.optimizers if isinstance(each, AdamW) and each.telemetry]
        for index, optimizer in enumerate(ours):
            stats = optimizer.stats(per_param=self._per_param, model=pl_module)
            pl_module.log_dict(grouped(stats, GROUP if len(ours) == 1 else f"{GROUP}{index}"))
