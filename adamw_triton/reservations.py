"""What an optimizer's groups ask for, and the store that gives it: formats, places, batches of launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adamw_triton.arguments import name_of
from adamw_triton.batch import Batch, Item
from adamw_triton.checkpoint import has_state
from adamw_triton.selection.auto import Chooser
from adamw_triton.selection.selector import bits_of
from adamw_triton.state.formats import as_real, format_for
from adamw_triton.state.placement import Policy
from adamw_triton.store import State, Store, Wanted
from adamw_triton_kernels import tables

_KEPT_BATCHES = 16
"""Sets of parameters whose launches are kept, for training that alternates between a few."""

Groups = Sequence[Mapping[str, Any]]


class Reservations:
    """Keeps the store as groups and chooser want it. Groups and state are the optimizer's own, passed
    with each call: a load replaces them."""

    def __init__(self, chooser: Chooser, policy: Policy, transfer: str, block_size: int) -> None:
        self._chooser = chooser
        self._block_size = block_size
        self.store = Store(policy, transfer)
        self._formats: list[tuple[Any, Any]] | None = None
        """What the groups asked for when places were given."""
        self._batches: dict[tuple[Any, ...], Batch] = {}
        self._captured: list[Batch] = []
        """A CUDA graph uses their tables and buffers whenever it is replayed."""

    def intact(self, groups: Groups, state: State) -> bool:
        """Whether ``state`` is as we left it, and the groups still ask for the formats it has."""
        return self._formats == _formats(groups) and self.store.intact(state)

    def settle(self, groups: Groups, state: State) -> None:
        """Take over whatever ``state`` shows."""
        if not self.intact(groups, state):
            self.reserve(groups, state, stateful_only=True)

    def reserve(self, groups: Groups, state: State, *, stateful_only: bool = False) -> None:
        """Give all parameters that are trained, or those that have state, their places. If they are all to
        have them, this is a first step, at the latest: then it is decided what places there are."""
        tables.require_eager()
        self._batches.clear()
        if not self._chooser.decided and not stateful_only:
            self._chooser.decide(groups, state)
            self.store.policy = self._chooser.policy
        while True:
            try:
                self.store.reserve(self._wanted(groups, state, stateful_only), state)
                break
            except torch.OutOfMemoryError:
                if not self._chooser.retreat():
                    raise
                self.store.policy = self._chooser.policy
        self._formats = _formats(groups)

    def spill(self, device: torch.device, nbytes: int, groups: Groups, state: State) -> int:
        """Take so many bytes of state off a GPU; how many it were."""
        self._batches.clear()
        return self.store.spill(device, nbytes, self._wanted(groups, state), state)

    def batch_of(self, items: list[Item]) -> Batch:
        """Kept for steps on the same parameters.

        Raises:
            RuntimeError: a CUDA graph is being captured, and this would be the first such step.
        """
        key = tuple((id(item.slot), item.param.dtype, item.grad.dtype) for item in items)
        batch = self._batches.get(key)
        if batch is None:
            tables.require_eager()
            if len(self._batches) >= _KEPT_BATCHES:
                self._batches.clear()
            batch = self._batches[key] = Batch(items, self.store.page_elements)
        if tables.capturing():
            self._captured.append(batch)
        return batch

    def _wanted(self, groups: Groups, state: State, stateful_only: bool = False) -> list[Wanted]:
        found = []
        for group_index, group in enumerate(groups):
            amsgrad = bool(group["amsgrad"])
            bits = bits_of(group["state_bits"], amsgrad, self._chooser.bits)
            betas = float(group["betas"][0]), float(group["betas"][1])
            for index, param in enumerate(group["params"]):
                trained = not stateful_only and (param.requires_grad or param.grad is not None)
                if trained or has_state(state.get(param, {})):
                    state_format = format_for(as_real(param).numel(), bits, self._block_size, amsgrad)
                    found.append(Wanted(param, name_of(group, group_index, index), state_format, betas))
        return found


def _formats(groups: Groups) -> list[tuple[Any, Any]]:
    return [(group["amsgrad"], group["state_bits"]) for group in groups]
