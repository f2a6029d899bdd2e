"""The numbers of a step for each piece of a launch, of its group's settings and its step count. Worked out on
the host, or, for CUDA graphs, on the device."""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adamw_triton_kernels import Hyper, hyper_table
from adamw_triton_kernels.tables import DeviceTable, has_float64, send
from adamw_triton_kernels.work import SETTINGS, hyper_table_at


class Settings:
    """What a step finds in the parameter groups.

    Args:
        loss_scale: gradients are divided by it; of one element if it is a tensor.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], loss_scale: float | Tensor | None) -> None:
        self._groups = groups
        self.loss_scale = loss_scale
        self._hypers: dict[tuple[int, int], Hyper] = {}
        self._tables: dict[tuple[tuple[int, int], ...], Tensor] = {}

    def of(self, group: int) -> tuple[Any, ...]:
        """In the order of ``SETTINGS``, some perhaps tensors; the loss scale is still to come."""
        found = self._groups[group]
        sign = -1.0 if found["maximize"] else 1.0
        return (sign, *found["betas"], found["eps"], found["lr"], found["weight_decay"])

    def table(self, rows: tuple[tuple[int, int], ...]) -> Tensor:
        """The numbers of each (group, step), on the host: most launches and pages want the same."""
        known = self._tables.get(rows)
        if known is None:
            known = self._tables[rows] = hyper_table([self._hyper(*row) for row in rows])
        return known

    def _hyper(self, group: int, step: int) -> Hyper:
        known = self._hypers.get((group, step))
        if known is None:
            if step < 1:
                raise ValueError(
                    f"a parameter of group {group} has taken {step - 1} steps by its optimizer.state: "
                    "somebody has written to 'step', which counts from 0"
                )
            sign, beta1, beta2, eps, lr, weight_decay = map(float, self.of(group))
            known = self._hypers[group, step] = Hyper.at(
                step,
                lr=lr,
                betas=(beta1, beta2),
                eps=eps,
                weight_decay=weight_decay,
                grad_scale=sign / self._loss_scale,
            )
        return known

    @functools.cached_property
    def _loss_scale(self) -> float:
        return 1.0 if self.loss_scale is None else float(self.loss_scale)


class Numbers(Protocol):
    """Of the pieces of one launch."""

    def at_next_step(self, settings: Settings) -> tuple[tuple[int, ...], Tensor]:
        """Each piece's row in the hyper table, and the table. The rows are one object until they change."""


class _Shared(NamedTuple):
    """Which pieces share a row of numbers."""

    rows: tuple[int, ...]
    """Of each piece."""
    firsts: tuple[int, ...]
    """The first piece of each row."""
    leaders: list[int]
    """For each piece, the first one of its row."""


class OnHost:
    """Step counts are on the host: pieces of one group and one step count share a row.

    Args:
        groups: of each piece.
        steps: the step counts of a buffer.
        slots: index in ``steps`` of each piece.
    """

    def __init__(self, groups: Sequence[int], steps: Tensor, slots: Sequence[int]) -> None:
        self._groups = groups
        self._steps = steps
        self._slots = slots
        self._shared: _Shared | None = None

    def at_next_step(self, settings: Settings) -> tuple[tuple[int, ...], Tensor]:
        counts = self._steps.tolist()
        steps = [counts[slot] for slot in self._slots]
        shared = self._shared
        if shared is None or steps != [steps[leader] for leader in shared.leaders]:
            shared = self._shared = self._share(steps)
        numbered = tuple([(self._groups[first], _count(steps[first]) + 1) for first in shared.firsts])
        return shared.rows, settings.table(numbered)

    def _share(self, steps: Sequence[float]) -> _Shared:
        leader_of: dict[tuple[int, float], int] = {}
        keys = list(zip(self._groups, steps, strict=True))
        for position, key in enumerate(keys):
            leader_of.setdefault(key, position)
        row_of = {key: row for row, key in enumerate(leader_of)}
        return _Shared(
            rows=tuple(row_of[key] for key in keys),
            firsts=tuple(leader_of.values()),
            leaders=[leader_of[key] for key in keys],
        )


def _count(steps: float) -> int:
    return -1 if math.isnan(steps) else int(steps)  # refused by `Settings`


class OnDevice:
    """Step counts are on the device, and the host never waits for one: each piece has a row. Arguments as
    ``OnHost``'s."""

    def __init__(self, groups: Sequence[int], steps: Tensor, slots: Sequence[int]) -> None:
        self._groups = list(dict.fromkeys(groups))
        self._steps = steps
        self._slots = send(torch.tensor(slots, device="cpu"), steps.device)
        self._rows = tuple(range(len(groups)))
        self._there = steps.device if has_float64(steps.device) else torch.device("cpu")
        group_of = torch.tensor([self._groups.index(group) for group in groups], device="cpu")
        self._group_of = send(group_of, self._there)
        self._numbers = DeviceTable(self._there)

    def at_next_step(self, settings: Settings) -> tuple[tuple[int, ...], Tensor]:
        numbers, there = array("d"), []
        for row, group in enumerate(self._groups):
            for column, value in enumerate(settings.of(group)):
                if isinstance(value, Tensor) and value.device == self._steps.device:
                    there.append((row, column, value))
                    numbers.append(0.0)
                else:
                    numbers.append(float(value))
        table = self._numbers.of(numbers, capturable=True).view(-1, len(SETTINGS)).clone()
        for row, column, value in there:
            table[row, column].copy_(value.squeeze())
        if settings.loss_scale is not None:
            table[:, 0] /= torch.as_tensor(settings.loss_scale, device=table.device)
        steps = self._steps[self._slots].to(self._there)
        return self._rows, hyper_table_at(steps + 1, table[self._group_of])
