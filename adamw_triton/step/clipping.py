"""What a step makes of the norm of its gradients: they are clipped, or it is skipped or refused. The numbers
stay on the device; the host waits for none, unless it is to refuse."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton.choices import NONFINITE
from adamw_triton.memory.lasting import lasting
from adamw_triton.paging.pager import never
from adamw_triton.state.buffers import Slot, StateBuffer
from adamw_triton.state.shards import Summed
from adamw_triton.tensors import is_flattened
from adamw_triton_kernels import Verdict, norms_for
from adamw_triton_kernels.tables import capturing, has_float64, send, send_home
from adamw_triton_kernels.work import SKIP, Adapting

PROPAGATE, SKIPPED, RAISED = NONFINITE
NAMED = 3
"""Tensors that an error names."""
ELSEWHERE = (
    "all that are on this rank are finite, so another rank has some that are not, or the norm of all ranks' "
    "is above 3.4e38"
)


GradientNorms = Mapping[torch.device, tuple[Any, Tensor]]
"""By device, what works out the norms of the gradients there, and what it found: of these, or of parts."""


class Judged(NamedTuple):
    """Of one step."""

    outcomes: Mapping[torch.device, Tensor]
    """fp32 [2] on each: the factor of all gradients, and their norm."""
    own: Mapping[torch.device, tuple[Tensor, Tensor]]
    """fp32 [gradients] on each: the factor of each, and its norm's average after this step. Empty: all have
    one factor."""
    skips: bool
    """Whether the factor may be ``SKIP``."""
    known_skipped: Callable[[], bool]
    """Whether the host knows by now that it is."""

    def factors(self, device: torch.device) -> Tensor:
        return self.own[device][0] if self.own else self.outcomes[device][:1]

    def counted(self, ones: Tensor) -> Tensor:
        """What a step count rises by: ``ones``, or nothing."""
        return ones * (self.outcomes[ones.device][0] != SKIP) if self.skips else ones


class Gradients:
    """Those of one batch, whose parameters have these slots, as their norms are worked out."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self.of_device: dict[torch.device, list[int]] = defaultdict(list)
        """Positions of those of each."""
        self.places: list[int] = []
        """Of each gradient among those of its device."""
        for position, slot in enumerate(slots):
            mine = self.of_device[slot.buffer.device]
            self.places.append(len(mine))
            mine.append(position)
        self._norms: dict[torch.device, tuple[Any, Summed]] = {}

    def norms(self, grads: Sequence[Tensor]) -> GradientNorms:
        if not self._norms:
            for slot in self._slots:
                _check_whole(slot)
            self._norms = {device: self._of(device, mine) for device, mine in self.of_device.items()}
        return {
            device: (norms, summed.of(norms.of([grads[i] for i in self.of_device[device]]), _exact(device)))
            for device, (norms, summed) in self._norms.items()
        }

    def _of(self, device: torch.device, mine: Sequence[int]) -> tuple[Any, Summed]:
        slots = [self._slots[i] for i in mine]
        adapts = [tuple(slot.scalars().values()) for slot in slots if slot.buffer.scalars.norms]
        norms = norms_for(device).Norms([slot.numel for slot in slots], device, adapts)
        return norms, self.summed[device]

    @functools.cached_property
    def summed(self) -> dict[torch.device, Summed]:
        """On each, what makes numbers of shards those of whole parameters."""
        return {
            device: Summed([self._slots[position].param for position in mine], device)
            for device, mine in self.of_device.items()
        }

    @functools.cached_property
    def _averaged(self) -> list[tuple[StateBuffer, Tensor, Tensor]]:
        """Of each buffer the slots here, and their gradients' places."""
        of_buffer: dict[StateBuffer, list[tuple[int, int]]] = defaultdict(list)
        for slot, place in zip(self._slots, self.places, strict=True):
            of_buffer[slot.buffer].append((slot.index, place))
        found = []
        for buffer, pairs in of_buffer.items():
            slots, places = send(torch.tensor(pairs, device="cpu"), buffer.device).unbind(1)
            found.append((buffer, slots, places))
        return found

    def keep(self, judged: Judged) -> None:
        """The new averages."""
        if judged.own:
            for buffer, slots, places in self._averaged:
                buffer.norms[slots] = judged.own[buffer.device][1][places]


def _check_whole(slot: Slot) -> None:
    if is_flattened(slot.param):
        raise ValueError(
            f"{slot.name} is this rank's shard of what FSDP (version 1) has flattened: by its norm "
            "max_grad_norm, adaptive_clip and nonfinite would go, and each rank its own way. Leave them off "
            "and call the model's clip_grad_norm_()"
        )


class Clipping:
    """Args:
    max_norm: of all gradients; None: they are not clipped.
    factor: of each gradient, times the average of its norm; None: they are not clipped.
    nonfinite: one of ``choices.NONFINITE``.
    whole: whether what is judged is all of a step.
    """

    def __init__(
        self, max_norm: float | None, factor: float | None, nonfinite: str, *, whole: bool = True
    ) -> None:
        self._refused = "nothing has been stepped" if whole else "none of this bucket has been stepped"
        self._max_norm = max_norm
        self._factor = factor
        self._nonfinite = nonfinite
        self._skipped: dict[torch.device, Tensor] = {}
        self._norms: list[Tensor] = []
        """Of the gradients of the last step, bucket by bucket: unscaled, not clipped."""

    def begin(self) -> None:
        """Another step: what is judged from now on belongs to it."""
        self._norms = []

    @property
    def active(self) -> bool:
        return (self._max_norm, self._factor, self._nonfinite) != (None, None, PROPAGATE)

    @property
    def norm(self) -> Tensor | None:
        """Of the gradients of the last step: fp32, on a device of theirs."""
        if len(self._norms) < 2:
            return self._norms[0] if self._norms else None
        device = self._norms[0].device
        norms = torch.stack([norm.to(device) for norm in self._norms])
        total: Tensor = torch.linalg.vector_norm(norms.to(_exact(device))).float()
        return total

    @property
    def skipped(self) -> int:
        """Steps; waits for the last one."""
        return int(next(iter(self._skipped.values()))) if self._skipped else 0

    def judge(
        self,
        norms: GradientNorms,
        loss_scale: float | Tensor | None,
        faults: Callable[[], Sequence[str]],
    ) -> Judged:
        """
        Args:
            norms: by device.
            faults: what is wrong with which gradient.

        Raises:
            RuntimeError: there are gradients that are not finite, and that is to be refused.
        """
        if not norms:
            self._norms.append(torch.zeros(()))
            return Judged({}, {}, False, never)
        outcomes, own = {}, {}
        for device, (mine, found) in norms.items():
            here = [each.to(device, non_blocking=True) for _, each in norms.values()]
            scale = _scale(loss_scale, device)
            given = Verdict(self._max_norm, scale, self._counter(device))
            outcome = norms_for(device).verdict(torch.cat(here) if len(here) > 1 else here[0], given)
            outcomes[device] = outcome
            if self._factor is not None:
                own[device] = mine.adapt(found, outcome, Adapting(self._factor, scale))
        first = next(iter(outcomes.values()))
        self._norms.append(first[1])
        if self._nonfinite == RAISED and not first[1].isfinite():  # the host waits
            wrong = faults()
            more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            what = "; ".join(wrong[:NAMED]) or f"all are finite, but their norm is {float(first[1])}"
            raise RuntimeError(f"gradients are not finite, and {self._refused}: {what}{more}")
        skips = self._nonfinite == SKIPPED
        return Judged(outcomes, own, skips, _arrival(first) if skips else never)

    @lasting()
    def _counter(self, device: torch.device) -> Tensor | None:
        if self._nonfinite != SKIPPED:
            return None
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.float32, device=device)
        return self._skipped[device]


def _exact(device: torch.device) -> torch.dtype:
    """For squares: fp32 has none of 1e30."""
    return torch.float64 if has_float64(device) else torch.float32


def _scale(loss_scale: float | Tensor | None, device: torch.device) -> Tensor | None:
    if loss_scale is None:
        return None
    if isinstance(loss_scale, Tensor):
        return loss_scale.to(device, torch.float32, non_blocking=True).view(1)
    return torch.full((1,), loss_scale, dtype=torch.float32, device=device)


def _arrival(outcome: Tensor) -> Callable[[], bool]:
    """Whether the factor is known to be ``SKIP``: on a GPU, once a copy has arrived on the host."""
    if outcome.device.type == "cpu":
        skipped = bool(outcome[0] == SKIP)
        return lambda: skipped
    if outcome.device.type != "cuda" or capturing():
        return never
    here, event = send_home(outcome)
    return lambda: bool(event.query()) and bool(here[0] == SKIP)


def describe(grad: Tensor, name: str) -> str | None:
    """How many elements of a gradient are not finite; None if all are."""
    bad = int((~grad.isfinite()).sum())
    return f"{bad} of {grad.numel()} elements of the gradient of {name}" if bad else None
