"""One parameter's state into its slot: made ready first, so that nothing can fail later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adamw_triton.checkpoint.entries import Saved, flat_of
from adamw_triton.checkpoint.parts import read_part
from adamw_triton.memory.overlaps import share_memory
from adamw_triton.state.buffers import Slot
from adamw_triton.state.formats import Float32, Moments, is_dense, kept_arrays
from adamw_triton_kernels.codes import LARGEST_ROOT
from adamw_triton_kernels.work import NEAREST

LARGEST_V = LARGEST_ROOT**2
"""Beyond, a block of 8-bit state has no scale."""

Betas = tuple[float, float]

_EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Arrival:
    """A parameter's state on its way into a slot. ``commit`` only copies: nothing is left that could fail."""

    slot: Slot
    step: float
    strides: tuple[int, ...]
    parts: dict[str, Tensor]
    """Flat, as the slot's ranges are."""
    inexact: bool
    """Whether the weight was kept exactly, and is no longer."""
    norm: float

    def commit(self) -> None:
        for name, target in self.slot.flat().items():
            if not _same(target, self.parts[name]):
                target.copy_(self.parts[name])
        self.slot.buffer.steps[self.slot.index] = self.step
        self.slot.buffer.norms[self.slot.index] = self.norm
        self.slot.lay_out(self.strides)
        self.slot.version = None


def prepare(entry: object, slot: Slot, betas: Betas, *, fresh: bool, taken: Sequence[Tensor] = ()) -> Arrival:
    """Make of a parameter's state, of any dialect, what its slot will hold: codes of the slot's format as
    they are, in their own memory order; else it is encoded anew.

    Args:
        betas: of its group. They bound m by v, see ``raised``.
        fresh: the slot holds nothing yet, and may be written to at once.
        taken: memory that others may overwrite before this arrives: what lies there is copied.

    Raises:
        ValueError: naming the parameter and what is wrong.
    """
    saved = read_part(entry, slot.param, slot.name)
    strides, own = slot.strides, slot.flat()
    if saved.format == replace(slot.format, weights=NEAREST) and is_dense(saved.elements):
        parts = {array.name: flat_of(saved.parts[array.name]) for array in slot.format.moments}
        if not _in_order(saved.elements, slot):
            strides = saved.elements.stride()
    elif isinstance(slot.format, Float32):
        parts = _flat_moments(saved, slot)
    else:
        # The scales of before are part of an encoding: these begin at none, whatever was here.
        parts = own if fresh else {name: torch.zeros_like(array) for name, array in own.items()}
        where = next(iter(own.values())).device  # paged: the host, for the moments may not fit the GPU
        exact = all(part.dtype in _EXACT for part in saved.parts.values())
        moments = _flat_moments(saved.to(where), slot)
        slot.format.encode(raised(moments, betas, lost=0.0 if exact else LARGEST_V), parts)
    parts |= _kept(saved, slot, own, in_order=strides == slot.strides)
    if not fresh:
        given = [part.untyped_storage().data_ptr() for part in saved.parts.values()]
        parts = {
            name: _waiting(part, own[name], taken, part.untyped_storage().data_ptr() in given)
            for name, part in parts.items()
        }
    inexact = any(part.any() for part in saved.kept.values()) and slot.format.weights not in saved.kept
    return Arrival(slot, saved.step, strides, parts, inexact, saved.norm)


def _kept(saved: Saved, slot: Slot, own: Mapping[str, Tensor], *, in_order: bool) -> dict[str, Tensor]:
    """What goes with the weight, in the order of the other parts; zeros, where nothing was saved, make the
    exact weight the one that is there."""
    found = {}
    for array in kept_arrays(slot.format.weights):
        part = saved.kept.get(array.name)
        if part is None:
            found[array.name] = torch.zeros_like(own[array.name], device="cpu")
        else:
            found[array.name] = _flat_in_order(part, slot) if in_order else flat_of(part)
    return found


def _waiting(part: Tensor, target: Tensor, taken: Sequence[Tensor], given: bool) -> Tensor:
    """Where it stays until the others are ready: as it is if it was given so and nobody writes there. What
    was made here waits on the host, for state may not fit a GPU twice."""
    if not given:
        return part.cpu()
    if _same(target, part) or not any(share_memory(part, memory) for memory in taken):
        return part
    return part.clone()


def _flat_moments(saved: Saved, slot: Slot) -> Moments:
    """fp32, flat, in the slot's memory order."""
    moments = saved.moments()
    moments.setdefault("max_exp_avg_sq", moments["exp_avg_sq"])
    wanted = (
        {array.name for array in slot.format.moments} if isinstance(slot.format, Float32) else set(moments)
    )
    return {key: _flat_in_order(moment, slot) for key, moment in moments.items() if key in wanted}


def raised(moments: Moments, betas: Betas, *, lost: float) -> Moments:
    """With a v of up to ``lost`` no smaller than an AdamW can have it beside m, since 8 bits keep m by its
    ratio to sqrt(v):

        |m| <= (1-b1) / sqrt((1-b2) * (1 - b1**2/b2)) * sqrt(v)

    by Cauchy and Schwarz over the gradients that both are sums of; 7.3 sqrt(v) with the default betas. In
    fp16, or in another optimizer's 8 bits, a small v is rounded to nothing while m is still there, and one
    such element would take the scale of its block. Where b1**2 >= b2 there is no such bound. In fp32 only a
    v of 0 is lost: others are right, though under other betas than now they may be below the bound.
    """
    b1, b2 = betas
    m, v = moments["exp_avg"], moments["exp_avg_sq"]
    if b1 * b1 < b2 or b1 == 0:
        bound = (1 - b1) / math.sqrt((1 - b2) * (1 - (b1 * b1 / b2 if b1 else 0)))
        v = torch.where(v <= lost, torch.maximum(v, (m / bound).square_()), v)
    return {**moments, "exp_avg_sq": v.clamp(max=LARGEST_V)}


def _flat_in_order(real: Tensor, slot: Slot) -> Tensor:
    if not _in_order(real, slot):
        ordered = torch.empty_strided(real.shape, slot.strides, dtype=real.dtype, device=real.device)
        real = ordered.copy_(real)
    return real.as_strided((slot.numel,), (1,))


def _in_order(real: Tensor, slot: Slot) -> bool:
    pairs = zip(real.shape, real.stride(), slot.strides, strict=True)
    return all(size == 1 or stride == ours for size, stride, ours in pairs)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two flat tensors are the same memory."""
    return a.device == b.device and a.data_ptr() == b.data_ptr() and a.dtype is b.dtype
