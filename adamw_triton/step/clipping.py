"""What a step makes of the norm of its gradients: they are clipped, or it is skipped or refused. The numbers
stay on the device; the host waits for none, unless it is to refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton.arguments import NONFINITE
from adamw_triton.memory.lasting import lasting
from adamw_triton_kernels import Verdict, norms_for
from adamw_triton_kernels.tables import capturing
from adamw_triton_kernels.work import SKIP

PROPAGATE, SKIPPED, RAISED = NONFINITE
NAMED = 3
"""Tensors that an error names."""


class Judged(NamedTuple):
    """Of one step."""

    outcomes: Mapping[torch.device, Tensor]
    """fp32 [2] on each: the factor of all gradients, and their norm."""
    skips: bool
    """Whether the factor may be ``SKIP``."""
    known_skipped: Callable[[], bool]
    """Whether the host knows by now that it is."""

    def factors(self, device: torch.device) -> Tensor:
        return self.outcomes[device][:1]

    def counted(self, ones: Tensor) -> Tensor:
        """What a step count rises by: ``ones``, or nothing."""
        return ones * (self.factors(ones.device) != SKIP) if self.skips else ones


class Clipping:
    """Args:
    max_norm: of all gradients; None: they are not clipped.
    nonfinite: one of ``arguments.NONFINITE``.
    """

    def __init__(self, max_norm: float | None, nonfinite: str) -> None:
        self._max_norm = max_norm
        self._nonfinite = nonfinite
        self._skipped: dict[torch.device, Tensor] = {}
        self.norm: Tensor | None = None
        """Of the gradients of the last step, unscaled and not clipped: fp32, on a device of theirs."""

    @property
    def active(self) -> bool:
        return self._max_norm is not None or self._nonfinite != PROPAGATE

    @property
    def skipped(self) -> int:
        """Steps; waits for the last one."""
        return int(next(iter(self._skipped.values()))) if self._skipped else 0

    def judge(
        self,
        norms: Mapping[torch.device, Tensor],
        loss_scale: float | Tensor | None,
        faults: Callable[[], Sequence[str]],
    ) -> Judged:
        """
        Args:
            norms: of the gradients of each device, or of parts of them.
            faults: what is wrong with which gradient.

        Raises:
            RuntimeError: there are gradients that are not finite, and that is to be refused.
        """
        if not norms:
            self.norm = torch.zeros(())
            return Judged({}, False, _never)
        outcomes = {}
        for device in norms:
            here = [each.to(device, non_blocking=True) for each in norms.values()]
            given = Verdict(self._max_norm, _scale(loss_scale, device), self._counter(device))
            outcomes[device] = norms_for(device).verdict(torch.cat(here) if len(here) > 1 else here[0], given)
        first = next(iter(outcomes.values()))
        self.norm = first[1]
        if self._nonfinite == RAISED and not self.norm.isfinite():  # the host waits
            found = faults()
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            what = "; ".join(found[:NAMED]) or f"all are finite, but their norm is {float(self.norm)}"
            raise RuntimeError(f"gradients are not finite, and nothing has been stepped: {what}{more}")
        skips = self._nonfinite == SKIPPED
        return Judged(outcomes, skips, _arrival(first) if skips else _never)

    @lasting()
    def _counter(self, device: torch.device) -> Tensor | None:
        if self._nonfinite != SKIPPED:
            return None
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.float32, device=device)
        return self._skipped[device]


def _scale(loss_scale: float | Tensor | None, device: torch.device) -> Tensor | None:
    if loss_scale is None:
        return None
    if isinstance(loss_scale, Tensor):
        return loss_scale.to(device, torch.float32, non_blocking=True).view(1)
    return torch.full((1,), loss_scale, dtype=torch.float32, device=device)


def _never() -> bool:
    return False


def _arrival(outcome: Tensor) -> Callable[[], bool]:
    """Whether the factor is known to be ``SKIP``: on a GPU, once a copy has arrived on the host."""
    if outcome.device.type == "cpu":
        skipped = bool(outcome[0] == SKIP)
        return lambda: skipped
    if outcome.device.type != "cuda" or capturing():
        return _never
    here = torch.empty(2, dtype=torch.float32, device="cpu", pin_memory=True)
    here.copy_(outcome, non_blocking=True)
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(outcome.device))
    return lambda: bool(event.query()) and bool(here[0] == SKIP)


def describe(grad: Tensor, name: str) -> str | None:
    """How many elements of a gradient are not finite; None if all are."""
    bad = int((~grad.isfinite()).sum())
    return f"{bad} of {grad.numel()} elements of the gradient of {name}" if bad else None
