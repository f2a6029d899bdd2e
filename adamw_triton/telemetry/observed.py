"""What one step did to every tensor, as numbers that people know, made of the sums that its update has left.

Sums of squares, not norms, so that those of tensors, pages, buckets and shards add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton_kernels.statistics import COLUMN, SAMPLED
from adamw_triton_kernels.work import SKIP, Hyper

HISTORY = 64
"""Steps that are remembered."""
NORMS = ("grad_norm", "weight_norm", "update_norm")
RATIOS = ("update_ratio", "decay_share", "lost_share")
MOMENTS = ("exp_avg_rms", "exp_avg_sq_mean", "exp_avg_sq_max", "effective_lr")
COUNTS = ("nan_count", "inf_count")
CODES = ("top_share", "bottom_share", "zero_share", "stalled_share")
"""Of 8-bit state alone, of one code in ``SAMPLED``."""
METRICS = (*NORMS, *RATIOS, *MOMENTS, *COUNTS, "clip_coefficient", *CODES)
"""Of a tensor and, under the same names, of all. Of a step that was skipped they are 0, but for what is of
gradients. Squares are added up in fp32: elements count from about 1e-19 to 1e19.

- ``grad_norm``: of the gradient, unscaled, before it was clipped
- ``weight_norm``: of the weight that the step found
- ``update_norm``: of what was taken from it, before it was rounded
- ``update_ratio``: update_norm/weight_norm
- ``decay_share``: the norm of lr*weight_decay*weight, over update_norm
- ``lost_share``: of all weights those that an update which is not zero has left as they were, for it was
  rounded away
- ``exp_avg_rms``: the root of the mean square of m, after the step
- ``exp_avg_sq_mean``, ``exp_avg_sq_max``: of v (with amsgrad, of its largest); NaN is never the largest
- ``effective_lr``: what m is multiplied by where v is ``exp_avg_sq_mean``: lr/(1-beta1**step) over
  sqrt(v/(1-beta2**step))+eps; of all tensors the mean, elements counting alike
- ``nan_count``, ``inf_count``: elements of the gradient
- ``clip_coefficient``: what the gradient was multiplied by; of all the smallest; 0 if the step was skipped or
  clipped by an infinite norm
- ``top_share``: of v's codes those at 255, above which nothing fits; ``bottom_share``: those at 1, the
  floor; ``zero_share``: of m's codes those at 0; ``stalled_share``: of v's codes those that stayed although
  v had changed
"""


class Told(NamedTuple):
    """What is known of a tensor without looking at it."""

    name: str
    numel: int
    """Of the whole parameter."""
    dtype: torch.dtype
    weights: str
    """How the weight is kept: "nearest", "stochastic", "remainder" or "master"."""
    bits: int
    """Of its state: 32 or 8."""
    lr: float
    """NaN if only the GPU knows it."""
    weight_decay: float
    dims: int = 2


@dataclass(frozen=True)
class Observed:
    """One step.

    Args:
        step: its number, see ``AdamW.stats``.
        tensors: those that had a gradient.
        sums: float64 [tensors, 16], see ``adamw_triton_kernels.statistics``.
        hyper: float64 [tensors, 7]: ``work.Hyper`` of each, without its phase.
        idle: names of the optimizer's other parameters.
    """

    step: int
    tensors: tuple[Told, ...]
    sums: Tensor
    hyper: Tensor
    idle: tuple[str, ...] = ()

    @property
    def skipped(self) -> bool:
        """For gradients that were not finite: of all tensors, or of a bucket's."""
        return bool((self._column("factor") == SKIP).any())

    @cached_property
    def each(self) -> Mapping[str, Tensor]:
        """Every metric of every tensor, float64 [tensors]. Those of codes are NaN where there are none."""
        numels, coded, skipped = self._numels, self._coded, self._column("factor") == SKIP
        gone = self._column("change") * self._hyper("step_size") ** 2
        decayed = self._column("weight") * (self._hyper("decay") * self._hyper("step_size")) ** 2
        mean = self._column("exp_avg_sq") / numels
        root = mean.sqrt() * self._hyper("inv_root_correction2") + self._hyper("eps")
        found = {
            **_norms(self._column("gradient"), self._column("weight"), gone, decayed),
            "lost_share": self._column("lost") / numels,
            "exp_avg_rms": (self._column("exp_avg") / numels).sqrt(),
            "exp_avg_sq_mean": mean,
            "exp_avg_sq_max": self._column("exp_avg_sq_max"),
            "effective_lr": torch.where(skipped, 0.0, self._hyper("step_size") / root),
            "nan_count": self._column("nan"),
            "inf_count": self._column("inf"),
            "clip_coefficient": torch.where(skipped, 0.0, self._column("factor")),
        }
        for metric in CODES:
            found[metric] = self._column(metric.removesuffix("_share")) / coded
        return found

    @cached_property
    def total(self) -> Mapping[str, float]:
        """Every metric of all tensors together; those of codes only where there are any."""
        if not self.tensors:
            return {}
        each, numels, coded = self.each, self._numels, self._coded
        gradient, weight, gone = (each[name].square().sum() for name in NORMS)
        decayed = (each["decay_share"] * each["update_norm"]).nan_to_num(0.0).square().sum()
        count = numels.sum()
        found = {
            **_norms(gradient, weight, gone, decayed),
            "lost_share": self._column("lost").sum() / count,
            "exp_avg_rms": (self._column("exp_avg").sum() / count).sqrt(),
            "exp_avg_sq_mean": self._column("exp_avg_sq").sum() / count,
            "exp_avg_sq_max": each["exp_avg_sq_max"].max(),
            "effective_lr": (each["effective_lr"] * numels).sum() / count,
            "nan_count": each["nan_count"].sum(),
            "inf_count": each["inf_count"].sum(),
            "clip_coefficient": each["clip_coefficient"].min(),
        }
        if coded.sum() > 0:
            for metric in CODES:
                found[metric] = self._column(metric.removesuffix("_share")).sum() / coded.sum()
        return {name: float(value) for name, value in found.items()}

    def flat(self, per_param: bool = False, names: Mapping[str, str] | None = None) -> dict[str, float]:
        """``total``, and the step; ``per_param``: also ``metric/name`` of each tensor. ``names``: other ones,
        by those that are told."""
        names = names or {}
        found = {"step": float(self.step), **self.total}
        for metric, values in self.each.items() if per_param else ():
            for told, value in zip(self.tensors, values.tolist(), strict=True):
                if told.bits == 8 or metric not in CODES:
                    found[f"{metric}/{names.get(told.name, told.name)}"] = value
        return found

    def _column(self, name: str) -> Tensor:
        return self.sums[:, COLUMN[name]]

    def _hyper(self, name: str) -> Tensor:
        return self.hyper[:, Hyper._fields.index(name)]

    @cached_property
    def _numels(self) -> Tensor:
        return _of(self.tensors, "numel").clamp(min=1)

    @cached_property
    def _coded(self) -> Tensor:
        """How many codes have been looked at."""
        sampled = torch.ceil(_of(self.tensors, "numel") / SAMPLED)
        return torch.where(_of(self.tensors, "bits") == 8, sampled, 0.0)


def _of(tensors: Sequence[Told], field: str) -> Tensor:
    return torch.tensor([getattr(told, field) for told in tensors], dtype=torch.float64, device="cpu")


def _norms(gradient: Tensor, weight: Tensor, gone: Tensor, decayed: Tensor) -> dict[str, Tensor]:
    """From sums of squares. The ratio to nothing is 0 if there is nothing."""
    return {
        "grad_norm": gradient.sqrt(),
        "weight_norm": weight.sqrt(),
        "update_norm": gone.sqrt(),
        "update_ratio": _ratio(gone, weight),
        "decay_share": _ratio(decayed, gone),
    }


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(part == 0, 0.0, part / whole).sqrt()
