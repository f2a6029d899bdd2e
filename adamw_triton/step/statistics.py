"""What the updates of a step leave of themselves, taken to the host behind it: nobody waits but who reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from adamw_triton.state.buffers import Slot
from adamw_triton.state.shards import Summed
from adamw_triton.telemetry.observed import HISTORY, Observed, Told
from adamw_triton.tensors import keys_of
from adamw_triton_kernels.statistics import WIDTH
from adamw_triton_kernels.tables import capturing, send, send_home

NUMBERS = 7
"""Of a row of the hyper table, without the dither's phase."""


class Left:
    """By the updates of one bucket. Each device has a table of a row for each tensor there, zero at first.

    Args:
        of_device: positions of each device's tensors among ``slots``, in the order of its rows.
        summed: of each device, what makes the rows of shards those of whole parameters.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        of_device: Mapping[torch.device, Sequence[int]],
        summed: Mapping[torch.device, Summed],
    ) -> None:
        self.sums = {
            device: torch.zeros((len(mine), WIDTH), dtype=torch.float32, device=device)
            for device, mine in of_device.items()
        }
        self._slots = {device: [slots[position] for position in mine] for device, mine in of_device.items()}
        self._summed = summed
        self._hyper: dict[torch.device, list[tuple[Sequence[int], Sequence[int], Tensor]]] = {}

    def told(self, device: torch.device, places: Sequence[int], rows: Sequence[int], hyper: Tensor) -> Tensor:
        """Which rows of a hyper table these tensors take, and the table; what the update adds to."""
        self._hyper.setdefault(device, []).append((places, rows, hyper))
        return self.sums[device]

    def of_device(self) -> Iterator[tuple[Sequence[Slot], Tensor]]:
        """Tensors, and of each a row: its sums, over all ranks, and its hyperparameters."""
        for device, sums in self.sums.items():
            hyper = torch.zeros((len(sums), NUMBERS), dtype=torch.float32, device=device)
            for places, rows, table in self._hyper.get(device, ()):
                there = send(torch.tensor([*places, *rows], device="cpu"), device)
                numbers = table if table.device == device else send(table, device)
                hyper[there[: len(places)]] = numbers[there[len(places) :], :NUMBERS]
            found = torch.cat([sums, hyper], dim=1)
            self._summed[device].rows(found)  # who has no element of a shard has no numbers for it either
            yield self._slots[device], found


class _Arriving:
    """One step on its way to the host."""

    def __init__(self, step: int, tensors: Sequence[Told], tables: Sequence[Tensor], idle: Sequence[str]):
        self._step, self._tensors, self._idle = step, tuple(tensors), tuple(idle)
        self._tables = [send_home(table) for table in tables]
        self._found: Observed | None = None

    def arrived(self, wait: bool) -> Observed | None:
        tables = self._tables  # before `_found`: of another thread that has it by now, they are gone
        if self._found is None and all(_is_here(event, wait) for _, event in tables):
            filled = [index for index, told in enumerate(self._tensors) if told.numel]
            rows = torch.cat([table.double().cpu() for table, _ in tables])[filled]
            tensors = tuple(self._tensors[index] for index in filled)
            self._found = Observed(self._step, tensors, rows[:, :WIDTH], rows[:, WIDTH:], self._idle)
            self._tables = []
        return self._found


def _is_here(event: Any, wait: bool) -> bool:
    if event is None:
        return True
    if wait:
        event.synchronize()
    return bool(event.query())


class Statistics:
    """Args:
    every: so many steps, one is looked at; 0: none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps = 0
        self._stepped = False
        self._left: list[Left] = []
        self._known: deque[_Arriving] = deque(maxlen=HISTORY)

    @property
    def wanted(self) -> bool:
        """Whether the step under way is to be looked at. None is that goes into a CUDA graph: its replays
        would leave what nobody hears of."""
        self._stepped = True
        return self._every > 0 and (self._steps + 1) % self._every == 0 and not capturing()

    def add(self, left: Left) -> None:
        """By a bucket that has been stepped."""
        self._left.append(left)

    def finish(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """At the end of ``step()``, when all its updates have been queued before what is queued next."""
        if not self._stepped:
            return
        self._steps += 1
        self._stepped = False
        left, self._left = self._left, []
        if not left:
            return
        names = keys_of(groups)
        settings = {id(param): group for group in groups for param in group["params"]}
        tensors, tables, stepped = [], [], set()
        for bucket in left:
            for slots, table in bucket.of_device():
                for slot in slots:  # whose parameter may have been taken out of its group since
                    key = id(slot.param)
                    stepped.add(key)
                    tensors.append(_told(slot, names.get(key, slot.name), settings.get(key, {})))
                tables.append(table)
        if not tensors:  # of a step without gradients
            return
        idle = [name for key, name in names.items() if key not in stepped]
        self._known.append(_Arriving(self._steps, tensors, tables, idle))
        for each in self._known:
            each.arrived(wait=False)  # and its pinned memory is free again

    def go_on_from(self, state: Mapping[Any, Any]) -> None:
        """Count from the steps that a loaded state has had. What others keep there may be anything."""
        found = [entry.get("step") for entry in state.values() if isinstance(entry, Mapping)]
        counts = [float(step) for step in found if isinstance(step, Tensor | int | float)]
        self._steps = int(max(filter(isfinite, counts), default=0))

    def drop(self) -> None:
        """What has been left by buckets of a step that is not to be."""
        self._left = []

    def history(self, wait: bool = True) -> list[Observed]:
        """Of the last steps that were looked at, the newest last. Any thread may ask."""
        found = [each.arrived(wait) for each in list(self._known)]
        return [each for each in found if each is not None]


def _told(slot: Slot, name: str, group: Mapping[str, Any]) -> Told:
    return Told(
        name=name,
        numel=slot.param.numel() * (2 if slot.is_complex else 1),
        dtype=slot.param.dtype,
        weights=slot.format.weights,
        bits=int(slot.format.name.removesuffix("bit")),
        lr=_number(group.get("lr", nan)),
        weight_decay=_number(group.get("weight_decay", nan)),
        dims=slot.param.dim(),
    )


def _number(value: float | Tensor) -> float:
    """NaN for what the host would have to wait for."""
    return nan if isinstance(value, Tensor) and not value.is_cpu else float(value)
