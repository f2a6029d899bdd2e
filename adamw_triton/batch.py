"""Which tensors go together in one launch, and with which hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton.state import Slot, StateBuffer, as_real
from adamw_triton_kernels import Hyper, Layout, Update, update_for


class Item(NamedTuple):
    """A parameter of this step, its gradient and its place."""

    group: int
    slot: Slot
    param: Tensor
    grad: Tensor


class Pair(NamedTuple):
    """What an update reads and writes: dense, real, in the slot's memory order."""

    param: Tensor
    grad: Tensor


def pair_of(item: Item) -> Pair:
    """The tensors themselves where their memory is in order, else ordered copies.

    A ``param`` that is not ``item.param``'s own memory has to be copied back after the update.
    """
    slot, param, grad = item.slot, item.param, item.grad
    if slot.contiguous and param.is_contiguous() and grad.is_contiguous() and not grad.is_neg():
        return Pair(param, grad)
    return Pair(
        _in_order(as_real(param), slot.strides),
        _in_order(as_real(grad.resolve_conj()).resolve_neg(), slot.strides),
    )


def _in_order(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides:
        return tensor
    ordered = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return ordered.copy_(tensor)


@dataclass(eq=False)
class Launch:
    """The tensors of one buffer and one pair of dtypes: one call of the format's update."""

    buffer: StateBuffer
    update: Update
    positions: list[int]
    """In the step's items."""
    groups: list[int]
    slots: Tensor
    """Index of each tensor's slot, int64."""
    layout: Layout | None = None
    rows: Sequence[int] = ()
    """The first tensor of each row of hyperparameters."""
    leaders: Tensor | None = None
    """For each tensor, the first one of its row."""

    @classmethod
    def of(cls, items: Sequence[Item], positions: list[int]) -> Launch:
        buffer = items[positions[0]].slot.buffer
        return cls(
            buffer,
            update_for(buffer.format.update, buffer.device),
            positions,
            [items[i].group for i in positions],
            torch.tensor([items[i].slot.index for i in positions]),
        )

    def run(self, pairs: Sequence[Pair], groups: Sequence[dict[str, Any]], grad_scale: float) -> None:
        """Update; ``grad_scale`` multiplies the gradients."""
        layout, steps = self._lay_out()
        hypers = [_hyper(groups[self.groups[leader]], int(steps[leader]), grad_scale) for leader in self.rows]
        params = [pairs[i].param for i in self.positions]
        grads = [pairs[i].grad for i in self.positions]
        self.update(params, grads, self.buffer.arrays, layout, hypers)

    def _lay_out(self) -> tuple[Layout, Tensor]:
        """The layout, made anew only if tensors that shared a step count no longer do."""
        steps = self.buffer.steps[self.slots]
        if self.layout is None or self.leaders is None or not steps.equal(steps[self.leaders]):
            leader_of: dict[tuple[int, float], int] = {}
            keys = list(zip(self.groups, steps.tolist(), strict=True))
            for position, key in enumerate(keys):
                leader_of.setdefault(key, position)
            self.rows = list(leader_of.values())
            self.leaders = torch.tensor([leader_of[key] for key in keys])
            row_of = {key: row for row, key in enumerate(leader_of)}
            slots = [self.buffer.slots[i] for i in self.slots.tolist()]
            self.layout = Layout(
                numels=tuple(slot.numel for slot in slots),
                offsets=tuple(slot.start for slot in slots),
                firsts=(0,) * len(slots),
                rows=tuple(row_of[key] for key in keys),
            )
        return self.layout, steps


def _hyper(group: dict[str, Any], step: int, grad_scale: float) -> Hyper:
    beta1, beta2 = group["betas"]
    return Hyper.at(
        step,
        lr=float(group["lr"]),
        betas=(float(beta1), float(beta2)),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        grad_scale=-grad_scale if group["maximize"] else grad_scale,
    )
