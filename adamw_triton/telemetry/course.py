"""Statistics over time: each a matrix of steps and tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import nan

import torch
from torch import Tensor

from adamw_triton.telemetry.observed import Observed, Told
from adamw_triton_kernels.work import NEAREST, Hyper


class Course:
    """Of some steps, each of which collected.

    Where a tensor had no gradient, what is said of it is NaN.
    """

    def __init__(self, steps: Sequence[Observed]) -> None:
        self._steps = steps
        self._last: dict[str, Told] = {told.name: told for step in steps for told in step.tensors}
        self._series: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._steps)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all tensors that had a gradient at any step."""
        return tuple(self._last)

    @cached_property
    def told(self) -> tuple[Told, ...]:
        """What was last known of each."""
        return tuple(self._last.values())

    @cached_property
    def numels(self) -> Tensor:
        """float64 [tensors]"""
        return torch.tensor([told.numel for told in self.told], dtype=torch.float64, device="cpu")

    @cached_property
    def rounded(self) -> Tensor:
        """Which weights are of 16 bits and rounded to nearest. bool [tensors]"""
        kinds = [told.weights == NEAREST and told.dtype.itemsize == 2 for told in self.told]
        return torch.tensor(kinds, dtype=torch.bool, device="cpu")

    def step(self, index: int) -> int:
        """Which call of ``step()`` one of these was."""
        return self._steps[index].step

    def total(self, metric: str) -> Tensor:
        """One of ``METRICS``: float64 [steps]"""
        return torch.tensor(
            [step.total.get(metric, nan) for step in self._steps], dtype=torch.float64, device="cpu"
        )

    def each(self, metric: str) -> Tensor:
        """One of ``METRICS``: float64 [steps, tensors]"""
        return self._kept(metric, lambda step: step.each[metric])

    def hyper(self, name: str) -> Tensor:
        """A number of ``Hyper``: float64 [steps, tensors]"""
        return self._kept(name, lambda step: step.hyper[:, Hyper._fields.index(name)])

    @cached_property
    def lr(self) -> Tensor:
        """float64 [steps, tensors]. Where only the GPU knows it, what the step made of it."""
        told = self._kept("lr", lambda step: _numbers([each.lr for each in step.tensors]))
        return torch.where(told.isnan(), self.hyper("step_size"), told)

    @cached_property
    def highest_lr(self) -> Tensor:
        """float64 [steps]"""
        return self.lr.nan_to_num(0.0).amax(1)

    @cached_property
    def weight_decay(self) -> Tensor:
        """float64 [steps, tensors]"""
        return self._kept("weight_decay", lambda step: _numbers([each.weight_decay for each in step.tensors]))

    def _kept(self, name: str, values: Callable[[Observed], Tensor]) -> Tensor:
        if name not in self._series:
            self._series[name] = self._aligned([values(step) for step in self._steps])
        return self._series[name]

    def _aligned(self, rows: Sequence[Tensor]) -> Tensor:
        found = torch.full((len(self._steps), len(self._last)), nan, dtype=torch.float64, device="cpu")
        for index, (row, columns) in enumerate(zip(rows, self._columns, strict=True)):
            found[index, columns] = row
        return found

    @cached_property
    def _columns(self) -> list[Tensor]:
        """Of each step, where its tensors stand among all."""
        place = {name: index for index, name in enumerate(self._last)}
        return [
            torch.tensor([place[told.name] for told in step.tensors], dtype=torch.long, device="cpu")
            for step in self._steps
        ]


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def streak(held: Tensor) -> Tensor:
    """For how many steps up to the last one something has held. bool [steps, ...] to int64 [...]"""
    return held.flip(0).long().cumprod(0).sum(0)
