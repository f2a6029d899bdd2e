"""Ranks that train one model keep their state alike: what does not fit on one fits on none.

They agree through the store of the default process group, without a collective: one would wait for ranks that
have no such optimizer, and pair with whatever collective these call next. Each tells what it has and waits
for the others, but not for ever; what is then decided first is what all follow, also those that come later.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, distributed
from torch.nn.parameter import is_lazy

from adamw_triton.memory.units import format_bytes
from adamw_triton.selection.plans import Plan, describe

PATIENCE = 10.0
"""Seconds at most, and a quarter of the process group's timeout: others may be waiting in a collective of the
user's. Ranks that train one model come to a step together, as their gradients did."""
WEARING = 0.25
"""Of a rank's patience is left whenever others did not come, until all come again: however many optimizers it
has alone, it waits in all no longer than a third more than for the first."""

_WAY_OUT = (
    "name the variant on all of them (variant='32bit', for example; 'paged_8bit' takes the least GPU memory)"
)

Groups = Sequence[Mapping[str, Any]]

_log = logging.getLogger("adamw_triton")


class Share(NamedTuple):
    """What a rank tells the others."""

    machine: str
    host_room: int
    host_bytes: tuple[int, ...]
    """Of each candidate."""
    obstacles: tuple[str, ...]
    rank: int


class Outcome(NamedTuple):
    """What was decided, by whichever rank was first to."""

    obstacles: tuple[str, ...]
    """Of each candidate."""
    kind: tuple[int, str]
    """Of the state: `Candidate.kind`."""
    ranks: tuple[int, ...]
    """Whose shares counted."""


class _Meeting(NamedTuple):
    """Of the ranks that take the first step of optimizers that look alike."""

    store: Any
    key: str
    """Under which all that they say is."""
    missed: str
    """Under which is how often others did not come to this rank's, since all last came."""

    @classmethod
    def of(cls, groups: Groups, settings: object, rank: int) -> _Meeting:
        """Optimizers look alike whose groups have parameters of the same dtypes and shapes (a flat one may be
        a shard, of any length) and whose ``settings`` are the same. The first such decision of a rank goes
        with the first of the others."""
        store = distributed.distributed_c10d._get_default_store()
        look = repr((settings, [[_look(param) for param in group["params"]] for group in groups]))
        alike = f"adamw_triton/{hashlib.sha256(look.encode()).hexdigest()[:16]}"
        number = store.add(f"{alike}/of_rank/{rank}", 1)
        return cls(store, f"{alike}/{number}", f"adamw_triton/missed/{rank}")

    def come(self, share: Share) -> None:
        self.store.set(f"{self.key}/{self.store.add(f'{self.key}/came', 1)}", json.dumps(share))

    def wait(self, world: int) -> None:
        """Until it is over, but not for ever."""
        missed = self.store.add(self.missed, 0)
        patience = min(PATIENCE, self.store.timeout.total_seconds() / 4) * WEARING**missed
        end, pause = time.monotonic() + patience, 0.005
        while not self.over(world):
            left = end - time.monotonic()
            if left <= 0:
                self.store.add(self.missed, 1)
                return
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, 0.2)

    def all_came(self) -> None:
        """Wait as long as ever from now on."""
        self.store.add(self.missed, -self.store.add(self.missed, 0))

    def over(self, world: int) -> bool:
        """Whether all are here, or it has been decided already."""
        return self.store.check([f"{self.key}/outcome"]) or len(self._shares()) == world

    def shares(self) -> list[Share]:
        return [Share(*json.loads(self.store.get(key))) for key in self._shares()]

    def _shares(self) -> list[str]:
        keys = [f"{self.key}/{number}" for number in range(1, self.store.add(f"{self.key}/came", 0) + 1)]
        return keys if self.store.check(keys) else [key for key in keys if self.store.check([key])]

    def decided(self, outcome: Outcome) -> Outcome:
        """What counts: the outcome that was there first."""
        self.store.compare_set(f"{self.key}/outcome", "", json.dumps(outcome))
        obstacles, kind, ranks = json.loads(self.store.get(f"{self.key}/outcome"))
        return Outcome(obstacles, tuple(kind), ranks)


def agree(plan: Plan, groups: Groups, settings: object) -> tuple[Plan, bool]:
    """The plan of all ranks of the default process group that take the first step of an optimizer that looks
    like this one; whether any others do. ``plan`` itself where there is one rank alone.

    Raises:
        RuntimeError: others have decided without this rank, and of what they chose nothing fits here.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return plan, False
    try:
        outcome = _ask(plan, groups, settings)
    except (RuntimeError, AttributeError) as error:  # a backend without a store, or its server is gone
        _log.warning("auto: this rank could not ask the others and decides alone (%s): %s", error, _WAY_OUT)
        return plan, False
    rank, others = distributed.get_rank(), [str(rank) for rank in outcome.ranks]
    plan = plan.without(outcome.obstacles)
    if rank in outcome.ranks:
        if len(others) < distributed.get_world_size():
            _log.warning(
                "auto: of %d ranks only %s came to the first step of an optimizer like this one. If others "
                "train the same model, they can only follow: %s",
                *(distributed.get_world_size(), ", ".join(others), _WAY_OUT),
            )
        return plan, len(others) > 1
    before = f"rank {', '.join(others)} chose {describe(outcome.kind)} before rank {rank} came"
    plan = plan.of_kind(outcome.kind, before)
    if (plan.chosen or plan.last_resort).kind != outcome.kind:
        raise RuntimeError(f"variant='auto': {before}, and here {plan.summary()}. {_WAY_OUT}")
    return plan, True


def _ask(plan: Plan, groups: Groups, settings: object) -> Outcome:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    meeting = _Meeting.of(groups, settings, rank)
    host_bytes = tuple(candidate.host_bytes for candidate in plan.candidates)
    obstacles = tuple(candidate.obstacle for candidate in plan.candidates)
    meeting.come(Share(socket.gethostname(), plan.host_room, host_bytes, obstacles, rank))
    meeting.wait(world)
    there = meeting.shares()
    common = merged(there)
    of_all = plan.without(common)
    kind = (of_all.chosen or of_all.last_resort).kind
    outcome = meeting.decided(Outcome(tuple(common), kind, tuple(sorted(share.rank for share in there))))
    if len(outcome.ranks) == world:
        meeting.all_came()
    return outcome


def _look(param: Tensor) -> tuple[str, Any]:
    shape = None if is_lazy(param) else tuple(param.shape)
    return str(param.dtype), shape if shape is None or len(shape) != 1 else "flat"


def merged(shares: Sequence[Share]) -> list[str]:
    """What stands in the way of each candidate: on some rank, or because ranks share a machine's memory."""
    machines: dict[str, list[Share]] = defaultdict(list)
    for share in shares:
        machines[share.machine].append(share)
    found = []
    for index in range(len(shares[0].obstacles)):
        on_ranks = (
            f"{share.obstacles[index]} on rank {share.rank}" for share in shares if share.obstacles[index]
        )
        on_machines = (
            f"needs {format_bytes(short)} more host memory for the {len(members)} ranks on {machine}"
            for machine, members in machines.items()
            if (short := sum(m.host_bytes[index] for m in members) - min(m.host_room for m in members)) > 0
        )
        found.append(next(on_ranks, "") or next(on_machines, ""))
    return found
