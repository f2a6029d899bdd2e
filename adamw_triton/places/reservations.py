"""What an optimizer's groups ask for, and the store that gives it: formats, places, batches of launches."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from adamw_triton.checkpoint import has_state
from adamw_triton.places.placing import Wanted
from adamw_triton.places.shown import park
from adamw_triton.places.store import Store
from adamw_triton.places.sums import Summing, Sums
from adamw_triton.selection.auto import Chooser
from adamw_triton.selection.selector import bits_of
from adamw_triton.state.buffers import STEPS, Scalars, State
from adamw_triton.state.formats import KEPT, SMALLEST_8BIT, Float32, format_for
from adamw_triton.state.placement import Policy
from adamw_triton.state.shards import is_shard, uncut, whole_numel
from adamw_triton.step.batch import Batch, Item
from adamw_triton.step.stepped import Alike, Apart, Groups, Stepped
from adamw_triton.tensors import is_trained, name_of
from adamw_triton_kernels import tables

_log = logging.getLogger("adamw_triton")

KEPT_BATCHES = 16
"""Sets of parameters whose launches are kept, for training that alternates between a few."""
KEPT_BUCKETS = 1024
"""The same where a step has many sets."""


class _Kept(NamedTuple):
    """The launches of one set of parameters, and what they were made from."""

    these: frozenset[int]
    """Ids of them."""
    alike: Alike
    apart: Apart
    batch: Batch


class Reservations:
    """Keeps the store as groups and chooser want it. Groups and state are the optimizer's own, passed
    with each call: a load replaces them."""

    def __init__(
        self,
        chooser: Chooser,
        policy: Policy,
        transfer: str,
        block_size: int,
        *,
        scalars: Scalars = STEPS,
        kept_batches: int = KEPT_BATCHES,
        beside: bool = False,
        summing: Summing | None = None,
    ) -> None:
        self._chooser = chooser
        self._most_batches = kept_batches
        self._block_size = block_size
        self.store = Store(policy, transfer, scalars=scalars, beside=beside)
        self.sums = None if summing is None else Sums(*summing, self.store.device)
        """Of gradients, where they add up on the host."""
        self._formats: list[tuple[Any, Any]] | None = None
        """What the groups asked for when places were given."""
        self._batches: list[_Kept] = []
        self._generation = 0
        """Of the store, when they were made."""
        self._told = False
        self._captured: list[Batch] = []
        """A CUDA graph uses their tables and buffers whenever it is replayed."""

    def intact(self, groups: Groups, state: State) -> bool:
        """Whether ``state`` is as we left it, and the groups still ask for the formats it has."""
        return self._chooser.decided and self._formats == _formats(groups) and self.store.intact(state)

    def settle(self, groups: Groups, state: State) -> None:
        """Take over whatever ``state`` shows, if it is decided what places there are."""
        if self._chooser.decided and not self.intact(groups, state):
            self.reserve(groups, state, stateful_only=True)

    def offload(self, groups: Groups, state: State) -> None:
        """Take state to the host, until the next step."""
        if self.sums is not None:
            with self.store.hold():
                self.sums.free()
        self.settle(groups, state)
        if self._chooser.decided:
            self.store.offload(state)
        else:
            park(state)

    def rehearse(self, groups: Groups, state: State, grads: Sequence[Tensor]) -> bool:
        """Whether the step that begins is none: there are no gradients, and it is not decided yet what places
        there are; or there is no state yet, and they and all learning rates are zero.
        torch.distributed.checkpoint takes one such step to see what state there will be: it is shown, without
        a place or a step counted. Any other counts and decides, the next one of zeros too.

        Where a warm-up begins with a learning rate of zero, a rank that also has no gradients but zeros is
        not told from that: it counts one step less than the others, and follows what they decide."""
        if not grads:
            return not self._chooser.decided
        if state or not all(map(_stands_still, groups)):
            return False
        if any(grad.any() for grad in grads):  # the host waits for them
            return False
        self.store.show(self._wanted(groups, state), state)
        return True

    def exact(self, groups: Groups, state: State) -> list[Wanted]:
        """Whose weights are kept exactly, or will be from the first step on, as far as it can be told."""
        return [each for each in self._wanted(groups, state) if each.format.weights in KEPT]

    def keep(self, these: Collection[int], groups: Groups, state: State) -> None:
        """Have ``state`` show what goes with these exact weights, by id, before their first step too: in its
        place, or in plain host memory until it is decided what places there are."""
        wanted = [each for each in self.exact(groups, state) if id(each.param) in these]
        if not self._chooser.decided:
            self.store.show(wanted, state)
        elif wanted:
            if not (self.intact(groups, state) and self._have_places(these, groups, state)):
                self.reserve(groups, state)
            self.store.attach([self.store.slots[id(each.param)] for each in wanted], state)

    def reserve(self, groups: Groups, state: State, *, stateful_only: bool = False) -> None:
        """Give all parameters that are trained, or those that have state, their places. If they are all to
        have them, this is a first step, at the latest: then it is decided what places there are."""
        tables.require_eager()
        if not self._chooser.decided and not stateful_only:
            self._chooser.decide(groups, state, {} if self.sums is None else self.sums.to_come(groups))
            self.store.policy = self._chooser.policy
        plan, policy = self._chooser.plan, self.store.policy
        try:
            self._reserve(groups, state, stateful_only)
        except BaseException:
            self._chooser.return_to(plan)
            self.store.policy = policy
            raise
        self._tell_of_shards(groups, state)
        self._formats = _formats(groups)
        self._batches.clear()  # what they used is free
        self._generation = self.store.generation

    def _tell_of_shards(self, groups: Groups, state: State) -> None:
        """That some keep 32 bits where 8 were asked for, once."""
        coded = {
            id(param)
            for group in groups
            if bits_of(group.get("state_bits"), bool(group["amsgrad"]), self._chooser.bits) == 8
            for param in group["params"]
            if is_shard(param) and whole_numel(param) >= SMALLEST_8BIT
        }
        if self._told or not coded:
            return
        wanted = [each for each in self._wanted(groups, state) if id(each.param) in coded]
        wide = [each for each in wanted if isinstance(each.format, Float32)]
        if wide:
            self._told = True
            _log.warning(
                "%s and %d others are sharded, and their rows are no whole blocks of %d: other numbers of "
                "ranks would have other codes, so they keep 32-bit state",
                *(wide[0].name, len(wide) - 1, self._block_size),
            )

    def _reserve(self, groups: Groups, state: State, stateful_only: bool) -> None:
        """By another choice if need be."""
        while True:
            try:
                self.store.reserve(self._wanted(groups, state, stateful_only), state)
                return
            except torch.OutOfMemoryError:
                if not self._chooser.retreat():
                    raise
                self.store.policy = self._chooser.policy

    def memory(self) -> dict[str, int]:
        """Bytes by place, by format, and of sums."""
        found = self.store.memory()
        if self.sums is not None:
            found["host"] += self.sums.nbytes
            found["staging"] += self.sums.staging_bytes
            found["sums"] = self.sums.nbytes
        return found

    def spill(self, device: torch.device, nbytes: int, groups: Groups, state: State) -> int:
        """Take so many bytes of state off a GPU; how many it were."""
        return self.store.spill(device, nbytes, self._wanted(groups, state), state)

    def unspill(self, device: torch.device, room: int, groups: Groups, state: State) -> int:
        """Take some of it back, if that needs no more than ``room`` bytes; how many it were."""
        return self.store.unspill(device, room, self._wanted(groups, state), state)

    def batch_of(self, stepped: Stepped, state: State) -> Batch | None:
        """The launches of a step, kept for steps of the same facts from the same streams. Of others
        everything is checked, and only then given a place. None of a step that is none yet (``rehearse``).

        Raises:
            RuntimeError: a CUDA graph is being captured, and this would be the first such step.
            RuntimeError, TypeError, ValueError: what cannot be stepped, by name.
        """
        if self._generation != self.store.generation:
            self._generation = self.store.generation
            self._batches.clear()
        ready = self.intact(stepped.groups, state)
        kept = self._kept_for(stepped) if ready else None
        if kept is None:
            stepped.check(self._chooser.must_keep == "stochastic")
        apart = kept.apart if kept else Apart(stepped)
        apart.check(stepped)
        if kept is None:
            tables.require_eager()
            if not (ready and self._have_places(set(map(id, stepped.owners)), stepped.groups, state)):
                if stepped.among is None and self.rehearse(stepped.groups, state, stepped.grads):
                    return None
                self.reserve(stepped.groups, state)
            if len(self._batches) >= self._most_batches:
                self._batches.clear()
            kept = _Kept(frozenset(map(id, stepped.owners)), Alike(stepped), apart, self._batch(stepped))
            self._batches.append(kept)
        if tables.capturing():
            self._captured.append(kept.batch)
        return kept.batch

    def fetch(self, these: Collection[int]) -> None:
        """Have the state of these parameters, by id, begin to come in, if their launches are kept."""
        for kept in self._batches if these else ():
            if kept.these == these:
                self.store.fetch(kept.batch.pages)
                return

    def _kept_for(self, stepped: Stepped) -> _Kept | None:
        # No generator with next(): an interrupt while it is closed would be lost.
        # The newest first: what is captured takes any.
        for kept in reversed(self._batches):
            if kept.alike.holds_for(stepped) and kept.batch.is_here:
                return kept
        return None

    def _batch(self, stepped: Stepped) -> Batch:
        slots = [self.store.slots[id(param)] for param in stepped.owners]
        items = map(Item, stepped.group_indices, slots, stepped.params, stepped.grads)
        return Batch(list(items), self.store.page_elements)

    def _have_places(self, these: Collection[int], groups: Groups, state: State) -> bool:
        """Whether all these parameters, by id, have those that their groups ask for."""
        slots = self.store.slots
        for param, _, state_format, _ in self._wanted(groups, state):
            slot = slots.get(id(param))
            if id(param) in these and not (slot and slot.fits(param, state_format)):
                return False
        return True

    def _wanted(self, groups: Groups, state: State, stateful_only: bool = False) -> list[Wanted]:
        found = []
        for group_index, group in enumerate(groups):
            amsgrad = bool(group["amsgrad"])
            bits = bits_of(group.get("state_bits"), amsgrad, self._chooser.bits)
            betas = float(group["betas"][0]), float(group["betas"][1])
            for index, param in enumerate(group["params"]):
                if is_lazy(param):
                    continue  # what was loaded for it waits
                if (not stateful_only and is_trained(param)) or has_state(state.get(param, {})):
                    state_format = format_for(
                        whole_numel(param),
                        bits,
                        self._block_size,
                        amsgrad,
                        param.dtype,
                        self._chooser.weights,
                        uncut(param),
                    )
                    found.append(Wanted(param, name_of(group, group_index, index), state_format, betas))
        return found


def _stands_still(group: Mapping[str, Any]) -> bool:
    """Whether its learning rate is zero, as far as the host knows."""
    lr = group["lr"]
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else False


def _formats(groups: Groups) -> list[tuple[Any, Any]]:
    return [(group["amsgrad"], group.get("state_bits")) for group in groups]
