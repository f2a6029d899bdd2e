"""A ``TrainerCallback`` that reports where the optimizer's state is, and what its steps did."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from adamw_triton.monitoring.names import grouped
from adamw_triton.optimizer import AdamW


class ReportCallback(TrainerCallback):
    """Prints the plan once it is made, and logs where the optimizer's state is, beside each training loss.

    Every ``logging_steps`` steps the log gains ``optimizer_bytes/gpu``, ``optimizer_bytes/host`` and
    ``optimizer_bytes/staging``. Where the optimizer clips or looks for NaN, ``skipped_steps`` is what it
    skipped, and ``grad_norm`` the norm that it found, unless the Trainer has clipped before and knows
    better (of released gradients it knows nothing). With ``telemetry``, ``optim/grad_norm``,
    ``optim/update_ratio`` and so on are of the last step that was looked at, ``optim/step``.

    One of ``Trainer(callbacks=[...])`` is called after those of W&B, TensorBoard and their kind: the console
    and ``trainer.state.log_history`` have the numbers then, these do not. ``ReportCallback.attach(trainer)``
    puts a callback in front of them.

    Other optimizers than ours are left alone.

    Args:
        per_param: what steps did also of every parameter, ``optim_grad_norm/<name>``: a dozen numbers each.
    """

    def __init__(self, per_param: bool = False) -> None:
        self._per_param = per_param
        self._printed: str | None = None

    @classmethod
    def attach(cls, trainer: Any, per_param: bool = False) -> ReportCallback:
        """A callback in front of those that ``trainer`` has; returns it."""
        callback = cls(per_param)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """The plan is made at the first step; one made anew later, when memory ran short, is news too."""
        plan = getattr(unwrap(optimizer), "plan", None)
        if plan is not None and state.is_world_process_zero and str(plan) != self._printed:
            self._printed = str(plan)
            tqdm.write(self._printed)  # as transformers prints its logs: without breaking the progress bar

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Any = None,
        optimizer: Any = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        ours = unwrap(optimizer)
        if not isinstance(ours, AdamW) or "loss" not in (logs or {}):
            return
        memory = ours.memory()
        found: dict[str, float] = {
            f"optimizer_bytes/{place}": memory[place] for place in ("gpu", "host", "staging")
        }
        if ours.grad_norm is not None:
            found["skipped_steps"] = ours.skipped_steps
            if ours.gradient_release or not (args.max_grad_norm and "grad_norm" in logs):
                found["grad_norm"] = float(ours.grad_norm)
        if ours.telemetry:
            found |= grouped(ours.stats(per_param=self._per_param, model=model))
        logs.update(found)
        if state.log_history:  # the Trainer has copied the logs there already
            state.log_history[-1].update(found)


def unwrap(optimizer: Any) -> Any:
    """What accelerate, or DeepSpeed within it, has wrapped."""
    while not isinstance(optimizer, AdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
