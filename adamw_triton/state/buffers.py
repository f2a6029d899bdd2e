"""The flat buffers that hold the state of many parameters.

All parameters of one device and one format share a ``StateBuffer``: a few long arrays in which each
parameter owns an aligned range.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton.memory.lasting import lasting
from adamw_triton.memory.pinned import host_bytes
from adamw_triton.state.formats import Arranged, Format, as_real, nbytes, round_up
from adamw_triton.state.shards import any_shard, first_index, is_shard, like, local, rows_of_blocks
from adamw_triton.telemetry.spans import STATE, allocated_as
from adamw_triton_kernels.work import REMAINDER

_log = logging.getLogger("adamw_triton")

State = MutableMapping[Tensor, dict[str, Any]]
"""What users see as ``optimizer.state``: views of our buffers, unless somebody put in something else."""


NORM = "exp_avg_norm"
"""In ``optimizer.state``: the running average of the norm of a parameter's gradient, infinite before there is
one."""


OFTEN = 20
"""Times that an exact weight begins anew before that is warned of: more than a few swaps of EMA weights."""


class Scalars(NamedTuple):
    """What is kept of a parameter as one number: its step count, and perhaps more."""

    on_device: bool = False
    """Else on the CPU, as torch.optim.AdamW keeps step counts by default."""
    norms: bool = False
    """Also ``NORM``."""


STEPS = Scalars()


@dataclass(eq=False)
class Slot:
    """A parameter's place in a buffer."""

    param: Tensor
    name: str
    """What error messages call the parameter."""
    buffer: StateBuffer
    index: int
    start: int
    numel: int
    """Real elements: a complex element is two. Of a shard those that are here, like all that follows."""
    shape: torch.Size
    strides: tuple[int, ...]
    """Of a dense tensor of the parameter's shape as real numbers, in the order of the state in memory: the
    parameter's when the slot was made, or that of the codes that were loaded."""
    contiguous: bool
    """Whether that order is the one of a contiguous, real tensor."""
    first: int = 0
    """Index in the whole parameter of the first element that is here."""
    entry: dict[str, Any] = field(default_factory=dict)
    """What ``optimizer.state[param]`` shows: views of the slot's range. Empty before the first update."""
    version: int | None = None
    """torch's count of what was written to the parameter, as it was after our last step."""
    begun_anew: int = 0
    """How often somebody else had written the exact weight."""

    @property
    def format(self) -> Format:
        return self.buffer.format

    @property
    def is_complex(self) -> bool:
        """Whether the parameter was when the slot was made."""
        return len(self.strides) > len(self.shape)

    def has_shape_of(self, param: Tensor) -> bool:
        """Whether the state is still one of a tensor like this."""
        return self.shape == local(param).shape and self.is_complex == param.is_complex()

    def fits(self, param: Tensor, state_format: Format) -> bool:
        """Whether the slot can go on being this parameter's."""
        return (
            self.param is param
            and self.format == state_format
            and self.has_shape_of(param)
            and self.buffer.device == param.device
        )

    def is_shown_by(self, entry: object) -> bool:
        """Whether ``entry`` holds this slot's own views, whatever else somebody keeps there."""
        if not isinstance(entry, Mapping) or not self.entry:
            return False
        return all(entry.get(key) is view for key, view in self.entry.items())

    def lay_out(self, strides: tuple[int, ...]) -> None:
        """Have the state in another memory order, as codes that come from elsewhere are."""
        if strides != self.strides:
            self.strides = strides
            shape = as_real(self.param).shape
            ordered = torch.empty_strided(shape, strides, device="meta").is_contiguous()
            self.contiguous = ordered and not self.is_complex

    def clear(self) -> None:
        """Back to before the first update."""
        self.buffer.steps[self.index] = 0
        self.buffer.norms[self.index] = math.inf
        for array in self.flat().values():
            array.zero_()
        self.entry, self.version = {}, None

    def flat(self, arrays: Mapping[str, Tensor] | None = None, begin: int = 0) -> dict[str, Tensor]:
        """The slot's range of each array, one-dimensional, in memory order.

        Args:
            arrays: parts of the buffer's arrays from the element ``begin`` on; the whole ones if None.
        """
        arrays = self.buffer.arrays if arrays is None else arrays
        ranges = {}
        for array in self.format.arrays:
            first = (self.start - begin) // array.per
            ranges[array.name] = arrays[array.name][first : first - (-self.numel // array.per)]
        return ranges

    def shaped(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ranges as others see them: in the parameter's shape, scales flat. Of a shard they are distributed
        as it is, scales as rows."""
        shape = (*self.shape, 2) if self.is_complex else self.shape
        views = {}
        for array in self.format.arrays:
            view = flat[array.name]
            if array.per == 1:
                view = view.as_strided(shape, self.strides)
                if self.is_complex and view.dtype is torch.float32:
                    view = torch.view_as_complex(view)
                view = like(self.param, view)
            elif is_shard(self.param):
                rows = view.view(self.shape[0], -(-self.shape[1:].numel() // array.per))
                view = like(self.param, rows, rows_of_blocks(self.param, array.per))
            views[array.name] = view
        return views

    def scalars(self) -> dict[str, Tensor]:
        """Views of no dimension."""
        norm = {NORM: self.buffer.norms[self.index]} if self.buffer.scalars.norms else {}
        return {"step": self.buffer.steps[self.index], **norm}

    def attach(self) -> dict[str, Any]:
        """Make ``entry``: the shaped ranges and the step count. What is returned is a copy: others may
        change theirs, and ours says what it was."""
        self.entry = {**self.scalars(), **self.shaped(self.flat())}
        return dict(self.entry)


def overwritten(slots: Sequence[Slot]) -> list[Slot]:
    """To whose parameters somebody else has written since ``remember``, if that was called."""
    now = _versions(slots)
    if now == [slot.version for slot in slots]:
        return []
    pairs = zip(slots, now, strict=True)
    return [slot for slot, version in pairs if slot.version not in (None, version)]


def remember(slots: Sequence[Slot]) -> None:
    """What the parameters are now."""
    for slot, version in zip(slots, _versions(slots), strict=True):
        slot.version = version


def begin_anew(slots: Sequence[Slot]) -> None:
    """The exact weights of parameters that somebody else has written are what is there now."""
    for slot in slots:
        slot.flat()[REMAINDER].zero_()
        slot.begun_anew += 1
    remember(slots)
    if any(slot.begun_anew == OFTEN for slot in slots):
        name = next(slot.name for slot in slots if slot.begun_anew == OFTEN)
        _log.warning(
            "somebody has written %s and %d others between steps, %d times by now: each time what their bits "
            "lack is lost, though weights are kept exactly; stochastic_rounding=True is right on average",
            *(name, len(slots) - 1, OFTEN),
        )
    if slots:
        _log.info("%d exact weights have been changed since the last step, and begin anew", len(slots))


def _versions(slots: Sequence[Slot]) -> list[int | None]:
    """What torch counts up whenever it writes to a tensor, but through ``.data``."""
    params = [slot.param for slot in slots]
    if any_shard(params):  # somebody may write to the whole, or to what is here
        return [param._version + is_shard(param) * local(param)._version for param in params]
    try:
        return [param._version for param in params]
    except RuntimeError:  # of what was made in inference mode nothing is counted
        return [None if param.is_inference() else param._version for param in params]


class Buffer:
    """Zeroed arrays of ``numel`` elements, for parameters of one device. A paged one lives in pinned host
    memory; one that is not may wait there.
    """

    @lasting()
    def __init__(self, arranged: Arranged, device: torch.device, numel: int, *, paged: bool = False) -> None:
        self.format = arranged
        self.device = device
        self.numel = numel
        self.paged = paged
        self.on_host = paged
        self.arrays = self._allocate()

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return nbytes(self.format, self.numel)

    @lasting()
    def move(self, copy: Callable[[Tensor, Tensor], None], *, to_host: bool) -> None:
        """Take the arrays to the host or back to the device, by ``copy(target, source)``. Views of them stay
        behind, and whoever calls keeps the memory that was left until the copies have happened."""
        before, was_on_host = self.arrays, self.on_host
        self.on_host = to_host
        try:
            self.arrays = self._allocate()
        except BaseException:
            self.on_host = was_on_host
            raise
        for name, array in self.arrays.items():
            copy(array, before[name])

    def _allocate(self) -> dict[str, Tensor]:
        sizes = {array: self.numel // array.per for array in self.format.arrays}
        if self.on_host:
            return {
                array.name: host_bytes(size * array.dtype.itemsize, self.device).view(array.dtype)
                for array, size in sizes.items()
            }
        with allocated_as(STATE):
            return {
                array.name: torch.zeros(size, dtype=array.dtype, device=self.device)
                for array, size in sizes.items()
            }


class StateBuffer(Buffer):
    """State of many parameters of one format, and what is kept as one number of each of ``slots``."""

    format: Format

    @lasting()
    def __init__(
        self,
        state_format: Format,
        device: torch.device,
        numel: int,
        slots: int,
        *,
        paged: bool = False,
        scalars: Scalars = STEPS,
    ) -> None:
        super().__init__(state_format, device, numel, paged=paged)
        self.scalars = scalars
        # One array, so that counting is one operation.
        where = device if scalars.on_device else torch.device("cpu")
        self.steps = torch.zeros(slots, dtype=torch.float32, device=where)
        self.norms = torch.full((slots,), math.inf, dtype=torch.float32, device=where)


class Page(NamedTuple):
    """A range of a buffer's elements; both ends are multiples of the format's alignment."""

    buffer: Buffer
    start: int
    stop: int

    def arrays(self) -> dict[str, Tensor]:
        """The range of each array."""
        return {
            array.name: self.buffer.arrays[array.name][self.start // array.per : self.stop // array.per]
            for array in self.buffer.format.arrays
        }

    def like(self) -> dict[str, Tensor]:
        """Their names, sizes and dtypes, as meta tensors."""
        return {
            array.name: torch.empty((self.stop - self.start) // array.per, dtype=array.dtype, device="meta")
            for array in self.buffer.format.arrays
        }


def make_slots(
    state_format: Format,
    params: Sequence[tuple[Tensor, str]],
    device: torch.device,
    *,
    paged: bool = False,
    scalars: Scalars = STEPS,
) -> list[Slot]:
    """A new buffer for these parameters, each with what messages call it; their places in it."""
    reals = [as_real(param) for param, _ in params]
    starts = [0]
    for real in reals:
        starts.append(starts[-1] + round_up(real.numel(), state_format.alignment))
    buffer = StateBuffer(state_format, device, starts.pop(), len(reals), paged=paged, scalars=scalars)
    slots = []
    for index, ((param, name), real, start) in enumerate(zip(params, reals, starts, strict=True)):
        dense = torch.empty_like(real, device="meta")  # in real's order, without its gaps
        contiguous = dense.is_contiguous() and not param.is_complex()
        shape, first = local(param).shape, first_index(param)
        slots.append(
            Slot(param, name, buffer, index, start, real.numel(), shape, dense.stride(), contiguous, first)
        )
    return slots
