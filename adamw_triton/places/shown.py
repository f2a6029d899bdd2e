"""What ``optimizer.state`` shows: our buffers, unless somebody put in something else."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, MutableMapping

from torch import Tensor

from adamw_triton import checkpoint
from adamw_triton.memory.host import require_host
from adamw_triton.memory.lasting import lasting
from adamw_triton.state.buffers import Slot, State


class Shown:
    """What one store has put there."""

    def __init__(self) -> None:
        self._seen: list[object] | None = None

    @property
    def unfinished(self) -> bool:
        """Whether that is being changed, or the change failed."""
        return self._seen is None

    def forget(self) -> None:
        """Before a change: what is interrupted is begun again."""
        self._seen = None

    def remember(self, state: State) -> None:
        """After it."""
        try:
            self._seen = list(_all_of(state))
        except TypeError:  # a wrapper's value that is no dict: looked at in each step
            self._seen = []

    def intact(self, state: State, slots: Mapping[int, Slot]) -> bool:
        """Whether ``state`` shows the ``slots`` (by id of the parameter) and no state that someone else put
        there: loaders move its tensors about."""
        if self._seen is None:
            return False
        try:
            pairs = itertools.zip_longest(_all_of(state), self._seen)
            if self._seen and all(itertools.starmap(operator.is_, pairs)):
                return True
        except TypeError:
            pass
        return self._is_ours(state, slots)

    def _is_ours(self, state: State, slots: Mapping[int, Slot]) -> bool:
        """The same, where not all is as it was: others keep state of their own there."""
        missing = {id(slot.param) for slot in slots.values() if slot.entry}
        for key, entry in state.items():
            slot = slots.get(id(key))
            if slot is not None and slot.entry:
                if not slot.is_shown_by(entry):
                    return False
                missing.remove(id(key))
            elif isinstance(key, Tensor) and checkpoint.has_state(entry):
                return False
        if missing:
            return False
        self.remember(state)
        return True


def _all_of(state: State) -> Iterator[object]:
    """Parameters, and the names and values of their entries, in this order."""
    flat = itertools.chain.from_iterable
    return itertools.chain(state, flat(state.values()), flat(map(dict.values, state.values())))


def keep_apart(slots: Iterable[Slot], state: State) -> None:
    """Where our views have been put under other keys than their parameters, copies of them: they are
    somebody else's now, and their places will be written to."""
    of_param = {id(slot.param): slot for slot in slots}
    ours = {id(view) for slot in of_param.values() for view in slot.entry.values()}
    for key, entry in state.items():
        if id(key) not in of_param and isinstance(entry, MutableMapping):
            for name, value in entry.items():
                if id(value) in ours:
                    entry[name] = value.clone()


def show(slots: Iterable[Slot], state: State) -> None:
    """Let ``state`` show their memory, beside what others keep there."""
    for slot in slots:
        state[slot.param] = {**slot.attach(), **checkpoint.others_of(state.get(slot.param, {}))}


@lasting()
def park(state: State) -> None:
    """Take what others have put into ``state`` to the host as it is, while nothing has a place yet.

    Raises:
        MemoryError: the host's memory is too small; nothing is changed then.
    """
    away = [
        (entry, key, tensor)
        for entry in state.values()
        if isinstance(entry, MutableMapping)
        for key, tensor in entry.items()
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu"
    ]
    require_host(sum(tensor.nbytes for _, _, tensor in away), "offloaded optimizer state")
    for entry, key, tensor in away:
        entry[key] = tensor.cpu()
