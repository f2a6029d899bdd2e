"""How much of a step the GPU spends on state that backward does not hide: an estimate, for plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from adamw_triton.selection.cards import Card
from adamw_triton.selection.plans import Candidate, format_seconds
from adamw_triton.state.placement import BUCKET_BYTES

UTILIZATION = 0.5
"""Share of the peak that forward and backward reach; assumed."""


class Run(NamedTuple):
    """How a model is trained between two steps."""

    tokens: int
    """Of a micro-batch."""
    micro_batches: int = 1
    checkpointing: bool = True
    """Whether backward computes a forward again."""
    released: bool = False
    sums: int = 0
    """Bytes of gradients that add up on the host."""


class Pass(NamedTuple):
    """Seconds of a micro-batch, but for attention's own products: two operations a weight and token forward,
    as many for gradients of inputs, and of trained weights."""

    forward: float
    backward: float

    @classmethod
    def of(cls, tensors: Sequence[Tensor], run: Run, flops: float) -> Pass:
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        trained = sum(tensor.numel() for tensor in floating if tensor.requires_grad)
        once = 2 * run.tokens / (UTILIZATION * flops)
        forward = once * sum(tensor.numel() for tensor in floating)
        return cls(forward, forward * (1 + run.checkpointing) + once * trained)

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def last_share(tensors: Sequence[Tensor]) -> float:
    """Of what is trained, the part that is stepped when backward is over: the last bucket, with the gradient
    of what forward used first."""
    trained = [tensor.nbytes for tensor in tensors if tensor.requires_grad]
    return min(1.0, max(BUCKET_BYTES, trained[0]) / sum(trained)) if trained else 1.0


def added(candidate: Candidate, run: Run, each: Pass, link: float, last: float) -> float:
    """Seconds that the state adds to forward and backward. What crosses the link does so beside backward
    where gradients are released, sums in every one, pages in the last one; what updates take beyond that is
    not hidden."""
    if not run.released or not (candidate.paged or run.sums):
        return candidate.seconds
    others, sums = run.micro_batches - 1, run.sums / link
    crossing = sums + ((candidate.host_bytes - run.sums) / link if candidate.paged else 0.0)
    updates = candidate.seconds - others * sums - crossing
    left = max(crossing - (1 - last) * each.backward, last * crossing)
    return others * max(0.0, sums - each.backward) + max(left, updates)


def describe(candidate: Candidate, tensors: Sequence[Tensor], run: Run, card: Card) -> str:
    """A sentence for people."""
    each = Pass.of(tensors, run, card.flops)
    rest = added(candidate, run, each, card.link, last_share(tensors))
    alone = run.micro_batches * each.seconds
    hidden = candidate.seconds - rest
    beside = f"{format_seconds(hidden)} pass beside backward, " if hidden > 0 else ""
    return (
        f"Forward and backward of {run.micro_batches} x {run.tokens:,} tokens take about "
        f"{format_seconds(alone)}, at half of the {card.name}'s {card.flops / 1e12:.0f} Tflop/s. Of the "
        f"optimizer's {format_seconds(candidate.seconds)}, {beside}{format_seconds(rest)} come on top"
        f"{f': {rest / alone:.1%}' if alone else ''}."
    )
