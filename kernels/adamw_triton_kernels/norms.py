"""The norm of all gradients, and what it says of a step: in plain torch. In Triton: ``norm_kernels.py``.

A norm of norms: of each gradient, or of chunks of it, in fp32; then of all of these. Squares are taken of
numbers near 1, so that norms from 1e-38 to 3e38 neither overflow nor vanish.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adamw_triton_kernels.tables import has_float64
from adamw_triton_kernels.work import AVERAGE, CLIP_EPS, SKIP, WARM_UP, Adapting, Verdict


class Norms:
    """Of the gradients of one device, of these lengths: the same set at every step, on one stream."""

    def __init__(
        self,
        numels: Sequence[int],
        device: torch.device,
        averages: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """``averages``: of each gradient the step count and the running average, fp32 of no dimension."""
        self._averages = averages
        self._dtype = torch.float64 if has_float64(device) else torch.float32

    def of(self, grads: Sequence[Tensor]) -> Tensor:
        """fp32 [some]: of each gradient."""
        if self._dtype is torch.float64:  # holds any square
            norms = torch.stack(torch._foreach_norm(list(grads), 2, dtype=self._dtype))
        else:
            norms = torch.stack([_norm(grad.float()) for grad in grads])
        return norms.float()

    def adapt(self, norms: Tensor, outcome: Tensor, given: Adapting) -> tuple[Tensor, Tensor]:
        """fp32 [gradients]: their factors, and their averages after this step.

        Args:
            norms: of ``of``.
            outcome: of ``verdict``; of its factor and the own one the smaller holds.
        """
        if given.loss_scale is not None:
            norms = norms / given.loss_scale.to(norms)
        steps, averages = (torch.stack(list(tensors)) for tensors in zip(*self._averages, strict=True))
        learns = (steps < WARM_UP) | averages.isinf()
        limit = given.factor * averages
        own = torch.where(~learns & (norms > limit), limit / norms, 1.0)
        factors = torch.where(own < outcome[0], own, outcome[0])  # SKIP and NaN stay
        held = factors * norms
        mixed = torch.where(averages.isinf(), held, torch.lerp(held, averages, AVERAGE))
        new = torch.where(steps < WARM_UP, torch.minimum(averages, held), mixed)
        return factors, torch.where((held > 0) & held.isfinite(), new, averages)


def verdict(norms: Tensor, given: Verdict) -> Tensor:
    """fp32 [2]: the factor of all gradients, and their norm.

    The factor is min(1, max_norm/(norm + 1e-6)), the norm that of unscaled gradients. If it is not finite and
    such a step is to be skipped, the factor is ``SKIP``, and counted.
    """
    norm = _norm(norms)
    if given.loss_scale is not None:
        norm = norm / given.loss_scale.to(norm)
    factor = torch.ones_like(norm)
    if given.max_norm is not None:
        factor = (given.max_norm / (norm + CLIP_EPS)).clamp(max=1.0)  # NaN stays
    if given.skipped is not None:
        bad = ~norm.isfinite()
        factor = torch.where(bad, SKIP, factor)
        given.skipped.add_(bad)
    return torch.cat([factor.view(1), norm.view(1)])


def _norm(x: Tensor) -> Tensor:
    """fp32, without overflow or underflow in between."""
    if x.numel() == 0:
        return x.new_zeros(())
    largest = x.abs().max()
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    norm: Tensor = unit * torch.linalg.vector_norm(x / unit)
    return norm
