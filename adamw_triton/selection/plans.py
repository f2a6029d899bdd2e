"""A ``Plan``: every way to keep the state, what each takes, and which one was chosen and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from adamw_triton.memory.units import format_bytes
from adamw_triton.selection.table import Table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group


_SUFFIXES = {"nearest": "", "stochastic": ", stochastic rounding", "exact": ", exact weights"}

UNKNOWN = 1 << 50
"""Bytes of memory of which nobody says how much it is: no limit."""


def describe(kind: tuple[int, str]) -> str:
    """A candidate's ``kind``, for people."""
    bits, weights = kind
    return f"{bits}-bit state{_SUFFIXES[weights]}"


class Limits(NamedTuple):
    """What a device has for state."""

    device: str
    room: int
    """Bytes of its memory that state and staging may take; negative if even the rest does not fit."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second from and to the host, each way while both run."""
    rates: str
    """Where the two come from."""
    shared: bool = False
    """Whether its memory is the host's: the CPU, and GPUs that have none of their own."""
    spent: tuple[tuple[str, int], ...] = ()
    """What led to the room, for people: first the memory, then what else takes of it."""

    def __str__(self) -> str:
        if not self.spent:
            return f"{self.device}: {_known(self.room)} for optimizer state"
        (_, memory), *others = self.spent
        line = f"{self.device}: {format_bytes(memory)}"
        line += "".join(f" - {format_bytes(count)} {name}" for name, count in others if count)
        return f"{line} = {format_bytes(self.room)} for optimizer state"


@dataclass(frozen=True)
class Candidate:
    """One way to keep the state, on all devices together."""

    name: str
    variant: str
    """The ``variant=`` that does the same."""
    bits: int
    paged: bool
    gpu_bytes: int
    """State and staging on the GPUs."""
    staging_bytes: int
    """The part of ``gpu_bytes`` that pages pass through."""
    host_bytes: int
    """State in host memory, and sums of gradients there."""
    seconds: float
    """Of a step, estimated from bandwidths; devices work side by side."""
    obstacle: str
    """Why it cannot be; empty if it fits."""
    budgets: tuple[int | None, ...] = ()
    """By device, bytes that state and staging may take of it; None for staging alone."""
    weights: str = "nearest"
    """How those of 16 bits are kept: "exact", rounded "stochastic"ally, or to "nearest"."""
    weight_bytes: int = 0
    """The part of the state that exact weights take."""

    @property
    def label(self) -> str:
        """The name, and how weights are kept."""
        return self.name + _SUFFIXES[self.weights]

    @property
    def kind(self) -> tuple[int, str]:
        """What ranks that train one model have to have alike: bits of state, and how weights are kept."""
        return self.bits, self.weights

    @property
    def fits(self) -> bool:
        return not self.obstacle


@dataclass(frozen=True, repr=False)
class Plan:
    """Candidates in the order of preference; the first that fits is chosen.

    ``str()`` of it is a table, and so are ``repr()``, ``rich.print`` and its display in a notebook.
    """

    candidates: tuple[Candidate, ...]
    prefer: str
    limits: tuple[Limits, ...]
    """Of each device."""
    host_room: int
    """Bytes of host memory that may be taken."""
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """None if nothing fits."""
        return next((candidate for candidate in self.candidates if candidate.fits), None)

    @property
    def followed(self) -> Candidate:
        """The chosen one; if nothing fits, the last resort."""
        return self.chosen or self.last_resort

    @property
    def last_resort(self) -> Candidate:
        """What to try if nothing fits."""
        paged = [candidate for candidate in self.candidates if candidate.staging_bytes]
        return min(paged or self.candidates, key=lambda c: (c.bits, c.gpu_bytes, c.host_bytes))

    def without(self, obstacles: Sequence[str]) -> Plan:
        """The plan with what else stands in the way of each candidate; empty for nothing."""
        return replace(
            self,
            candidates=tuple(
                replace(candidate, obstacle=candidate.obstacle or obstacle)
                for candidate, obstacle in zip(self.candidates, obstacles, strict=True)
            ),
        )

    def without_chosen(self, obstacle: str) -> Plan:
        """The plan after the chosen candidate has failed."""
        return self.without([obstacle if candidate is self.chosen else "" for candidate in self.candidates])

    def of_kind(self, kind: tuple[int, str], obstacle: str) -> Plan:
        """The plan where state has to be of that kind, because of the obstacle to others."""
        return self.without(["" if candidate.kind == kind else obstacle for candidate in self.candidates])

    def reason(self, candidate: Candidate) -> str:
        """Why a candidate was taken or not."""
        if candidate is self.chosen:
            return "chosen: the first that fits"
        return candidate.obstacle or "fits too"

    def summary(self) -> str:
        """One line."""
        taken = self.chosen
        if taken is None:
            return "nothing fits: " + "; ".join(f"{c.label} {c.obstacle}" for c in self.candidates)
        line = f"{taken.label}: {format_bytes(taken.gpu_bytes)} of GPU memory"
        line += f" and {format_bytes(taken.host_bytes)} of the host's" if taken.host_bytes else ""
        before = self.candidates[: self.candidates.index(taken)]
        return line + "".join(f"; {candidate.label} {candidate.obstacle}" for candidate in before)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, for logs."""
        return {
            "chosen": None if self.chosen is None else self.chosen.name,
            "prefer": self.prefer,
            "host_room": None if self.host_room >= UNKNOWN // 2 else self.host_room,
            "devices": [
                {
                    **limits._asdict(),
                    "room": None if limits.room >= UNKNOWN // 2 else limits.room,
                    "spent": dict(limits.spent),
                }
                for limits in self.limits
            ],
            "candidates": [
                {**asdict(candidate), "budgets": list(candidate.budgets), "fits": candidate.fits}
                for candidate in self.candidates
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return self._table().text()

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        yield self._table().rich(options.max_width)

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        """Of the ways that keep weights as the chosen one does; of the last ones if nothing fits."""
        shown = [
            each for each in self.candidates if each.weights == (self.chosen or self.candidates[-1]).weights
        ]
        rows = [
            (
                candidate.name,
                format_bytes(candidate.gpu_bytes - candidate.staging_bytes),
                format_bytes(candidate.staging_bytes),
                format_bytes(candidate.host_bytes),
                format_seconds(candidate.seconds),
                self.reason(candidate),
            )
            for candidate in shown
        ]
        rates = dict.fromkeys(
            f"{limits.bandwidth / 1e9:.0f} GB/s of memory and {limits.link / 1e9:.1f} GB/s each way to the "
            f"host ({limits.rates})"
            for limits in self.limits
        )
        host = f"Host memory: {_known(self.host_room)} can be taken. Steps are estimated from "
        return Table(
            "\n".join(map(str, self.limits)),
            ("state", "on GPU", "staging", "on host", "step", ""),
            rows,
            (host + "; ".join(rates) + ".", *self._of_weights(shown[0].weights), *self.notes),
            None if self.chosen is None else shown.index(self.chosen),
        )

    def _of_weights(self, kept: str) -> Iterator[str]:
        """How those of 16 bits are kept, where there was a choice."""
        if kept == "exact" and self.chosen:
            yield f"16-bit weights are kept exactly: {format_bytes(self.chosen.weight_bytes)} of the state."
        better = [candidate for candidate in self.candidates if candidate.weights != kept]
        if self.chosen and better and better[0] is self.candidates[0]:
            least = min(better, key=lambda each: (each.bits, each.gpu_bytes))
            how = {"stochastic": "rounded stochastically", "nearest": "rounded to nearest"}[kept]
            yield f"16-bit weights are {how}: exact ones fit nowhere ({least.name}: {least.obstacle})."


def _known(count: int) -> str:
    return "an unknown amount" if count >= UNKNOWN // 2 else format_bytes(count)


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
