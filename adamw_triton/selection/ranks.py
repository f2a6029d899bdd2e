"""All ranks of a job keep their state alike: what does not fit on one fits on none."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import distributed

from adamw_triton.memory.units import format_bytes
from adamw_triton.selection.plans import Plan


class Share(NamedTuple):
    """What a rank tells the others."""

    machine: str
    host_room: int
    host_bytes: tuple[int, ...]
    """Of each candidate."""
    obstacles: tuple[str, ...]


def agree(plan: Plan) -> Plan:
    """The plan of all ranks of the default process group, which all have to call this; ``plan`` itself where
    there is one rank alone."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return plan
    host_bytes = tuple(candidate.host_bytes for candidate in plan.candidates)
    obstacles = tuple(candidate.obstacle for candidate in plan.candidates)
    mine = Share(socket.gethostname(), plan.host_room, host_bytes, obstacles)
    shares: list[Share] = [mine] * distributed.get_world_size()
    distributed.all_gather_object(shares, mine)
    return plan.without(merged(shares))


def merged(shares: Sequence[Share]) -> list[str]:
    """What stands in the way of each candidate: on some rank, or because ranks share a machine's memory."""
    machines: dict[str, list[Share]] = defaultdict(list)
    for share in shares:
        machines[share.machine].append(share)
    found = []
    for index in range(len(shares[0].obstacles)):
        on_ranks = (
            f"{share.obstacles[index]} on rank {rank}"
            for rank, share in enumerate(shares)
            if share.obstacles[index]
        )
        on_machines = (
            f"needs {format_bytes(short)} more host memory for the {len(members)} ranks on {machine}"
            for machine, members in machines.items()
            if (short := sum(m.host_bytes[index] for m in members) - min(m.host_room for m in members)) > 0
        )
        found.append(next(on_ranks, "") or next(on_machines, ""))
    return found
