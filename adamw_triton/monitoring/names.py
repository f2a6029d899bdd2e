"""What the numbers are called outside of Python: one table, by which they are exported, and by which the
dashboard and the alert rules in examples/monitoring/ are made or checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PREFIX = "adamw_triton_"
GAUGE, COUNTER = "gauge", "counter"
GROUP = "optim"


class Metric(NamedTuple):
    """Of Prometheus."""

    name: str
    help: str
    kind: str = GAUGE
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """In which it is, where the name ends in one."""
        last = self.name.rpartition("_")[2]
        return last if last in ("bytes", "ratio") else ""


_OF_STATS = {
    "grad_norm": ("grad_norm", "Norm of the gradients, unscaled, before they were clipped"),
    "weight_norm": ("weight_norm", "Norm of the weights that the step found"),
    "update_norm": ("update_norm", "Norm of what the step took from the weights, before rounding"),
    "update_ratio": ("update_ratio", "Norm of the update over that of the weights; some 1e-3 is usual"),
    "decay_share": ("decay_ratio", "Norm of the weight decay over that of the update"),
    "lost_share": ("lost_updates_ratio", "Share of the weights whose update was rounded away"),
    "exp_avg_rms": ("exp_avg_rms", "Root of the mean square of the first moment"),
    "exp_avg_sq_mean": ("exp_avg_sq_mean", "Mean of the second moment"),
    "exp_avg_sq_max": ("exp_avg_sq_max", "Largest second moment"),
    "effective_lr": ("effective_lr", "What the first moment is multiplied by, at the mean of the second"),
    "nan_count": ("nan_elements", "Elements of the gradients that are NaN"),
    "inf_count": ("inf_elements", "Elements of the gradients that are infinite"),
    "clip_coefficient": (
        "clip_coefficient",
        "What the gradients were multiplied by; the smallest, and 0 if the step was skipped",
    ),
    "top_share": ("top_codes_ratio", "Share of the 8-bit second moments at the highest code"),
    "bottom_share": ("bottom_codes_ratio", "Share of the 8-bit second moments at the lowest code but 0"),
    "zero_share": ("zero_codes_ratio", "Share of the 8-bit first moments at code 0"),
    "stalled_share": (
        "stalled_codes_ratio",
        "Share of the 8-bit second moments whose code stayed, although they changed",
    ),
}
"""By the key in ``stats()``: the name, and what it is."""

STEP = Metric(f"{PREFIX}step", "The step that the statistics are of")
TOTALS = {
    "step": STEP,
    **{key: Metric(PREFIX + name, f"{text}: of all parameters") for key, (name, text) in _OF_STATS.items()},
}
"""By the key in ``stats()``."""
OF_PARAMETERS = {
    key: Metric(f"{PREFIX}parameter_{name}", f"{text}: of one parameter", GAUGE, ("parameter",))
    for key, (name, text) in _OF_STATS.items()
}
"""By the part of the key in ``stats(per_param=True)`` that is before its ``/``."""

LEARNING_RATE = Metric(f"{PREFIX}learning_rate", "Learning rate of a parameter group", GAUGE, ("group",))
MEMORY = Metric(f"{PREFIX}memory_bytes", "State and staging buffers, by where they are", GAUGE, ("place",))
SKIPPED = Metric(f"{PREFIX}skipped_steps_total", "Steps skipped for NaN or Inf gradients", COUNTER)
SPILLS = Metric(f"{PREFIX}spills_total", "Times that memory ran short and state moved to the host", COUNTER)
INFO = Metric(
    f"{PREFIX}optimizer_info",
    "1; what variant was asked for, and what a plan chose",
    GAUGE,
    ("variant", "chosen", "version"),
)

METRICS = (*TOTALS.values(), *OF_PARAMETERS.values(), LEARNING_RATE, MEMORY, SKIPPED, SPILLS, INFO)


def grouped(stats: Mapping[str, float], group: str = GROUP) -> dict[str, float]:
    """``stats()`` with keys by which TensorBoard, Weights & Biases and MLflow group: ``optim/grad_norm`` of
    all parameters, ``optim_grad_norm/<name>`` of one. None is a folder of another: MLflow's file store
    makes a file of each key, and has no place for ``grad_norm`` beside ``grad_norm/<name>``."""
    return {f"{group}_{key}" if "/" in key else f"{group}/{key}": value for key, value in stats.items()}
