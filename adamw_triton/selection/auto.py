"""``variant="auto"``: what is decided at the first step, and what is spilled when training grows later.

At the first step gradients are live and forward and backward have had their peak: the one moment when it is
known what is left for state.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adamw_triton.arguments import Variant
from adamw_triton.choices import Prefer
from adamw_triton.memory import gpu
from adamw_triton.memory.host import host_limit
from adamw_triton.selection import rates
from adamw_triton.selection.plans import UNKNOWN, Candidate, Limits, Plan, describe
from adamw_triton.selection.ranks import agree
from adamw_triton.selection.selector import Demand, Trained, select
from adamw_triton.selection.watch import Held, Ours, Spill, Unspill, Watch
from adamw_triton.state.buffers import State
from adamw_triton.state.placement import Policy, SumBytes, live_bytes
from adamw_triton.tensors import is_trained

SPILLED_AT_ONCE = 512 << 20
"""Bytes of state in a buffer, about: each has launches of its own, which at this size take hundreds of times
as long as launching them does."""

_log = logging.getLogger("adamw_triton")


class Chooser(Protocol):
    """What an optimizer asks about the format and the place of state."""

    @property
    def plan(self) -> Plan | None: ...

    @property
    def bits(self) -> int:
        """Of state, unless its group says otherwise."""

    @property
    def weights(self) -> str:
        """How those of 16 bits are kept: one of ``formats.WEIGHTS``."""

    @property
    def must_keep(self) -> str | None:
        """That, if there is no choice."""

    @property
    def policy(self) -> Policy: ...

    @property
    def decided(self) -> bool: ...

    def decide(
        self, groups: Sequence[Mapping[str, Any]], state: State, sums: Mapping[torch.device, SumBytes]
    ) -> None:
        """At the first step; ``state`` may show what was loaded; ``sums``: what sums of gradients on the host
        will take yet."""

    def retreat(self) -> bool:
        """After what was decided ran out of memory: decide otherwise; False if there is no other way."""

    def return_to(self, plan: Plan | None) -> None:
        """After no other way led anywhere, to what was decided before."""

    def attach(self, held: Held, spill: Spill, unspill: Unspill) -> None:
        """Be given methods of the optimizer, which is kept only weakly."""

    def watch(self) -> None:
        """At the beginning of every step: spill where training has come to need more. That also happens when
        an allocation fails between steps, whoever's it is. What was spilled comes back when there has been
        room for it, beside the highest peak so far, for long."""


@dataclass(frozen=True)
class Fixed:
    """A variant that the user named."""

    bits: int
    policy: Policy
    weights: str = "nearest"
    plan: None = None
    decided: bool = True

    @property
    def must_keep(self) -> str:
        return self.weights

    def decide(
        self, groups: Sequence[Mapping[str, Any]], state: State, sums: Mapping[torch.device, SumBytes]
    ) -> None: ...

    def retreat(self) -> bool:
        return False

    def return_to(self, plan: Plan | None) -> None: ...

    def attach(self, held: Held, spill: Spill, unspill: Unspill) -> None: ...

    def watch(self) -> None: ...


class Auto:
    """The decision of one optimizer. Can be copied and pickled; a copy keeps it, and watches anew.

    Args:
        budget: bytes that the user lets state take on each GPU; None for all that is left.
        block_size: of the 8-bit format.
        weights: how those of 16 bits may be kept, the best first.
        released: it decides while backward runs, when all activations are there and few gradients.
        prefer: as in ``select``.
        capturable: nothing may be paged, nor spilled later.
    """

    _prefer: Prefer = "speed"  # of one that was pickled before there was a choice

    def __init__(
        self,
        budget: int | None,
        block_size: int,
        capturable: bool = False,
        weights: Sequence[str] = ("nearest",),
        released: bool = False,
        prefer: Prefer = "speed",
    ) -> None:
        self._budget = budget
        self._weights = tuple(weights)
        self._released = released
        self._prefer = prefer
        self._block_size = block_size
        self._capturable = capturable
        self.plan: Plan | None = None
        self._devices: Sequence[torch.device] = ()
        self._watches: dict[torch.device, Watch] = {}
        self._ours: Ours | None = None
        self._agreed = False
        """With other ranks."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_watches": {}, "_ours": None}

    @property
    def _taken(self) -> Candidate | None:
        return None if self.plan is None else self.plan.followed

    @property
    def bits(self) -> int:
        return 32 if self._taken is None else self._taken.bits

    @property
    def weights(self) -> str:
        return self._weights[0] if self._taken is None else self._taken.weights

    @property
    def must_keep(self) -> str | None:
        return self._weights[0] if len(self._weights) == 1 else None

    @property
    def policy(self) -> Policy:
        """For the store."""
        if self._taken is None:
            return Policy(paged=False, grain=self._grain)
        budgets = dict(zip(self._devices, self._taken.budgets, strict=True))
        return Policy(self._taken.paged, budgets=budgets, grain=self._grain)

    @property
    def _grain(self) -> int | None:
        return None if self._capturable else SPILLED_AT_ONCE

    @property
    def decided(self) -> bool:
        return self.plan is not None

    def decide(
        self, groups: Sequence[Mapping[str, Any]], state: State, sums: Mapping[torch.device, SumBytes]
    ) -> None:
        trained: dict[torch.device, list[Trained]] = defaultdict(list)
        for group in groups:
            for param in group["params"]:
                if is_trained(param):
                    trained[param.device].append(Trained.of(param, group))
        loaded: Counter[torch.device] = Counter()
        for tensor in itertools.chain.from_iterable(
            e.values() for e in state.values() if isinstance(e, Mapping)
        ):
            if isinstance(tensor, Tensor):
                loaded[tensor.device] += tensor.nbytes
        host = host_limit()
        host_room = there = UNKNOWN if host is None else host.available
        self._devices = tuple(trained)
        demands = []
        for device in self._devices:
            live = live_bytes(t.numel * t.grad_itemsize for t in trained[device]) if self._released else 0
            limits, taken = self._limits(device, loaded[device], there, live)
            demands.append(Demand(limits, trained[device], sums.get(device, SumBytes())))
            host_room -= taken
        plan = select(
            demands,
            host_room,
            prefer=self._prefer,
            block_size=self._block_size,
            resident=self._capturable,
            weights=self._weights,
        )
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the gradients are there: so other ranks are about to come
        settings = (self._capturable, self._block_size, self._weights, self._prefer)
        self.plan, self._agreed = agree(plan, groups, settings)
        for device in self._devices:
            self._watch(device)
        if self.plan.chosen is None:
            _log.warning("auto: %s. Trying %s", self.plan.summary(), self.plan.last_resort.label)
        else:
            _log.info("auto: %s", self.plan.summary())

    def _limits(self, device: torch.device, loaded: int, host_room: int, to_come: int) -> tuple[Limits, int]:
        """Of a device, and what training will take of the host's memory there; ``to_come``: bytes of
        gradients that are not there yet."""
        allocator = gpu.allocator_for(device)
        if allocator is None:
            return Limits(str(device), host_room, *rates.known(device), shared=True), 0
        snapshot = allocator.snapshot()
        room, spent = snapshot.room(loaded) - to_come, snapshot.spent(loaded)
        if to_come:
            spent = (*spent, ("gradients to come", to_come))
        if self._budget is not None and self._budget < room:
            room, spent = self._budget, (("memory_budget", self._budget),)
        limits = Limits(allocator.name, room, *rates.known(device), shared=snapshot.shared, spent=spent)
        return limits, snapshot.to_come if snapshot.shared else 0

    def retreat(self) -> bool:
        if self.plan is None or self.plan.chosen is None:
            return False
        failed = self.plan.chosen
        plan = self.plan.without_chosen("ran out of memory when it was allocated")
        if self._agreed:
            plan = plan.of_kind(failed.kind, f"other ranks keep {describe(failed.kind)}")
        if plan.chosen is None:
            return False
        self.plan = plan
        for watch in self._watches.values():
            watch.owed = 0  # the other choice is the answer
        _log.warning("auto: %s ran out of memory; %s is used", failed.label, plan.chosen.label)
        return True

    def return_to(self, plan: Plan | None) -> None:
        self.plan = plan

    def attach(self, held: Held, spill: Spill, unspill: Unspill) -> None:
        self._ours = Ours(weakref.WeakMethod(held), weakref.WeakMethod(spill), weakref.WeakMethod(unspill))

    def watch(self) -> None:
        for device in self._devices:
            watch = self._watches.get(device) or self._watch(device)
            if watch is not None:
                watch.relieve()

    def _watch(self, device: torch.device) -> Watch | None:
        allocator = gpu.allocator_for(device)
        if self._capturable or allocator is None or self._ours is None:
            return None
        self._watches[device] = Watch(device, allocator, self._ours)
        return self._watches[device]


def chooser_for(
    variant: Variant,
    budget: int | None,
    block_size: int,
    capturable: bool,
    weights: Sequence[str],
    released: bool,
    prefer: Prefer = "speed",
) -> Chooser:
    """Of an optimizer with these arguments; ``weights``: how those of 16 bits may be kept, the best first."""
    if variant.chosen:
        return Auto(budget, block_size, capturable, weights, released, prefer)
    return Fixed(variant.bits, Policy(variant.paged, budget), weights[0])
