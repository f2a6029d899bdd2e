"""What one call of an update is told: hyperparameters, and where each tensor has its state.

Shared by the kernels and the plain-torch twin; imports neither.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Enough programs that the last wave of them is a small part of the launch, and few enough that their
# table stays under a megabyte however large the model is.
MAX_CHUNKS = 65_536
DITHER_STEP = 0x9E3779B9  # 2**32 / golden ratio: consecutive steps of one element are far apart
# The square root of the smallest normal fp32 number. What is less counts as this: GPUs take smaller v for
# zero, and a zero denominator would throw the weight.
SMALLEST_EPS = 2.0**-63

SKIP = -1.0
"""A factor of a step that is to leave all tensors and their state as they are. All factors of a call are, or
none is."""


CLIP_EPS = 1e-6
"""As torch.nn.utils.clip_grad_norm_ has it."""


class Verdict(NamedTuple):
    """What is to be made of the norm of all gradients."""

    max_norm: float | None
    """To this they are clipped; None: not at all."""
    loss_scale: Tensor | None
    """fp32, of one element, on the device: by it gradients are too large; None: by nothing."""
    skipped: Tensor | None
    """fp32 [1] on the device: counts steps that were skipped for a norm that is not finite; None: none is."""


class Adapting(NamedTuple):
    """How each gradient's norm is held to its running average (AdaGC, arXiv:2502.11034)."""

    factor: float
    """Times the average: the most it may be."""
    loss_scale: Tensor | None
    """As in ``Verdict``."""


WARM_UP = 100
"""Steps in which the average is the smallest norm so far."""
AVERAGE = 0.98
"""What the average keeps of itself in a step: the paper's."""

NEAREST, STOCHASTIC, REMAINDER, MASTER = "nearest", "stochastic", "remainder", "master"
"""How a weight is kept, see ``weights.py``. The last two are names of state arrays, too."""


class Hyper(NamedTuple):
    """The numbers that one step needs, as the arithmetic uses them; computed in double precision."""

    grad_scale: float
    """What gradients are multiplied by: 1/loss scale, negative to maximize."""
    gap1: float
    """From beta1 to the integer next to it: 1 - beta1 from a half on, else -beta1, -0.0 for 0. As fp32 it
    tells betas near 0 apart as well as those near 1; its sign bit tells the integer."""
    gap2: float
    """Of beta2."""
    inv_root_correction2: float
    """1/sqrt(1 - beta2**step)"""
    eps: float
    """At least ``SMALLEST_EPS``."""
    step_size: float
    """lr/(1 - beta1**step)"""
    decay: float
    """weight_decay * (1 - beta1**step): of a weight, ``step_size`` times this is taken."""
    phase: int
    """Of the 8-bit code's dither at this step, modulo 2**32."""

    @classmethod
    def at(
        cls,
        step: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_scale: float = 1.0,
    ) -> Hyper:
        """The numbers of the ``step``-th update (the first is 1)."""
        beta1, beta2 = betas
        return cls(
            grad_scale=grad_scale,
            gap1=1.0 - beta1 if beta1 >= 0.5 else -float(beta1),
            gap2=1.0 - beta2 if beta2 >= 0.5 else -float(beta2),
            inv_root_correction2=1.0 / math.sqrt(1.0 - beta2**step),
            eps=max(eps, SMALLEST_EPS),
            step_size=lr / (1.0 - beta1**step),
            decay=weight_decay * (1.0 - beta1**step),
            phase=step * DITHER_STEP % 2**32,
        )


def hyper_table(hypers: Sequence[Hyper]) -> Tensor:
    """``Hyper`` as updates take it: fp32 [rows, 8], the phase as its bits."""
    numbers = array("f", itertools.chain.from_iterable(hypers))  # in every step: torch would take longer
    bits = memoryview(numbers).cast("B").cast("I")
    for row, hyper in enumerate(hypers):
        bits[8 * row + 7] = hyper.phase
    return torch.frombuffer(numbers, dtype=torch.float32).view(-1, 8)


SETTINGS = ("grad_scale", "beta1", "beta2", "eps", "lr", "weight_decay")
"""What ``Hyper.at`` wants beside the step."""


def hyper_table_at(steps: Tensor, settings: Tensor) -> Tensor:
    """``hyper_table`` of ``Hyper.at``, worked out where the step counts are: the host need not know them.

    Args:
        steps: [rows], the number of each row's update; the first is 1.
        settings: float64 [rows, 6], in the order of ``SETTINGS``.
    """
    grad_scale, beta1, beta2, eps, lr, weight_decay = settings.unbind(1)
    step = steps.double()
    gap1, gap2 = (torch.where(beta >= 0.5, 1 - beta, -beta) for beta in (beta1, beta2))
    inv_root_correction2 = (1 - beta2**step).rsqrt()
    correction1 = 1 - beta1**step
    eps, step_size, decay = eps.clamp(min=SMALLEST_EPS), lr / correction1, weight_decay * correction1
    numbers = (grad_scale, gap1, gap2, inv_root_correction2, eps, step_size, decay)
    bits = (steps.long() * DITHER_STEP).to(torch.int32).view(torch.float32)
    return torch.cat([torch.stack(numbers, dim=1).float(), bits[:, None]], dim=1)


@dataclass(eq=False)
class Layout:
    """Where each of a call's tensors has its state, and which hyperparameters it takes.

    One object serves every step on the same tensors from one stream: the launcher keeps its device tables
    here, and what is sent on a stream is read and freed on no other.
    """

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    """Of the tensor's first element in the state arrays; a multiple of the format's alignment."""
    firsts: tuple[int, ...]
    """Index in the whole parameter of the tensor's first element: 0, unless it is a piece of one."""
    rows: tuple[int, ...]
    """Which row of the call's ``hyper_table`` it takes."""
    factors: tuple[int, ...] = ()
    """Which of the call's factors it takes; empty: the first."""
    sums: tuple[int, ...] = ()
    """Which row of the call's sums it takes, if there are any."""
    max_chunks: int = MAX_CHUNKS
    """Programs of the launch, at most about."""
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)

    def part(self, indices: Sequence[int]) -> Layout:
        """Of some of the tensors."""
        return Layout(
            numels=tuple(self.numels[index] for index in indices),
            offsets=tuple(self.offsets[index] for index in indices),
            firsts=tuple(self.firsts[index] for index in indices),
            rows=tuple(self.rows[index] for index in indices),
            factors=tuple(self.factors[index] for index in indices) if self.factors else (),
            sums=tuple(self.sums[index] for index in indices) if self.sums else (),
            max_chunks=self.max_chunks,
        )


Arrays = Mapping[str, Tensor]
"""State arrays by name."""

Addresses = tuple[Sequence[int], Sequence[int]]
"""Of a call's parameters and gradients."""

Call = Callable[[Arrays], None]
"""An update that wants nothing but the arrays. It can be called once."""


def in_turn(calls: Sequence[Call]) -> Call:
    """All of them, one after the other."""

    def call(state: Arrays) -> None:
        for each in calls:
            each(state)

    return calls[0] if len(calls) == 1 else call


class Update:
    """One AdamW step of many tensors, in place: (params, grads, state arrays, layout, hyper table, how
    weights are kept, factors, addresses, sums).

    Factors are fp32 [some], where the tensors are: what gradients are multiplied by; the layout says which is
    whose. None: by nothing.

    Addresses are those of params and grads, for which nobody need ask again. None: they are not known.

    Sums are fp32 [some, 16], where the tensors are: what the update leaves of itself for statistics
    (``statistics.py``) is added to these; the layout says which row is whose. None: it leaves nothing.

    In two parts where several updates are to be made whole. ``prepare`` does all that can fail (allocates,
    sends, compiles) and writes nothing; the call that it returns only writes. Of the state, ``prepare`` looks
    at names, dtypes and sizes alone: meta tensors will do.
    """

    def __init__(
        self,
        prepare: Callable[..., Call],
    ) -> None:
        self._prepare = prepare
        functools.update_wrapper(self, prepare)

    def prepare(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Arrays,
        layout: Layout,
        hyper: Tensor,
        weights: str = NEAREST,
        factors: Tensor | None = None,
        addresses: Addresses | None = None,
        sums: Tensor | None = None,
    ) -> Call:
        return self._prepare(params, grads, state, layout, hyper, weights, factors, addresses, sums)

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Arrays,
        layout: Layout,
        hyper: Tensor,
        weights: str = NEAREST,
        factors: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        self.prepare(params, grads, state, layout, hyper, weights, factors, sums=sums)(state)
