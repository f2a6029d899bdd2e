"""Parameters of which each rank has a part, torch's ``DTensor``: taken apart and put together here alone.

Below, there are plain tensors: what is here, the size of the whole, and where in it the part begins. A module
that has no such parameters never imports ``torch.distributed.tensor``.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adamw_triton_kernels.statistics import SUMS


def _class() -> Any:
    """``DTensor``, if anybody has imported it: else there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_shard(tensor: Tensor) -> bool:
    """Whether it stands for a tensor of which this rank has a part, or a replica."""
    found = _class()
    return found is not None and isinstance(tensor, found)


def any_shard(tensors: Sequence[Tensor]) -> bool:
    """Of all that are stepped this is asked in every step."""
    found = _class()
    return found is not None and any(issubclass(kind, found) for kind in set(map(type, tensors)))


def local(tensor: Tensor) -> Tensor:
    """What is here: the memory of a shard, any other tensor as it is."""
    if not is_shard(tensor):
        return tensor
    whole: Any = tensor
    here = whole._local_tensor  # of to_local() autograd would make another tensor each time
    found: Tensor = here.wait() if hasattr(here, "wait") else here  # a collective's result on its way
    return found


def local_like(tensor: Tensor, param: Tensor) -> Tensor:
    """What of a tensor goes with the part of the parameter that is here: a gradient, or state. Where it is
    distributed otherwise, ranks exchange it, all of them at this moment."""
    if is_shard(param) and is_shard(tensor):
        ours: Any = param
        theirs: Any = tensor
        if theirs.placements != ours.placements or theirs.device_mesh != ours.device_mesh:
            tensor = theirs.redistribute(ours.device_mesh, ours.placements)
    return local(tensor)


def like(param: Tensor, here: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A tensor that is distributed as the parameter is, of which ``here`` is this rank's part, wherever its
    memory is. ``shape``: of the whole, if it is not the parameter's."""
    if not is_shard(param):
        return here
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    ours: Any = param
    whole = param.shape if shape is None else shape
    strides = torch.empty(whole, device="meta").stride()
    meta = TensorMeta(whole, strides, here.dtype)
    # DTensor.from_local would take state that is paged to the mesh's devices.
    spec = DTensorSpec(ours.device_mesh, ours.placements, tensor_meta=meta)
    made: Any = DTensor
    found: Tensor = made(here, spec, requires_grad=False)
    return found


def whole_shape(tensor: Tensor) -> torch.Size:
    """Of all its parts together, as real numbers."""
    return torch.Size([*tensor.shape, 2]) if tensor.is_complex() else tensor.shape


def whole_numel(tensor: Tensor) -> int:
    """Real elements of all its parts together."""
    return whole_shape(tensor).numel()


def of_whole(whole: Tensor, param: Tensor, per: int = 1) -> Tensor:
    """Of a tensor that somebody has gathered, the part that goes with a shard: a view. ``per``: elements of a
    row that share one number of it."""
    sizes, offset = _within(param)
    last = param.dim() - 1
    for dim, (size, at) in enumerate(zip(sizes, offset, strict=True)):
        each = per if dim == last else 1
        whole = whole.narrow(dim, min(at // each, whole.shape[dim]), size // each)
    return whole


def part(tensor: Tensor, param: Tensor) -> Tensor:
    """Of a tensor of a parameter's shape, distributed or whole, what goes with what of that is here."""
    if is_shard(param) and not is_shard(tensor):
        return of_whole(tensor, param)
    return local_like(tensor, param)


def _within(param: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Of a shard: its sizes, and where in the whole it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    ours: Any = param
    return compute_local_shape_and_global_offset(param.shape, ours.device_mesh, ours.placements)


def first_index(param: Tensor) -> int:
    """In the whole parameter as real numbers, of the first element that is here. Where whole rows are here,
    the others follow; of columns they do not, and the index only tells ranks apart."""
    if not is_shard(param):
        return 0
    _, offset = _within(param)
    strides = torch.empty(param.shape, device="meta").stride()
    first = sum(at * stride for at, stride in zip(offset, strides, strict=True))
    return first * (2 if param.is_complex() else 1)


def fault(param: Tensor) -> str | None:
    """Why a shard cannot be stepped, if it cannot."""
    if is_shard(param) and any(placement.is_partial() for placement in _placements(param)):
        return "is a DTensor of partial sums, which no rank has the values of: redistribute it"
    return None


def uncut(param: Tensor) -> int:
    """How many elements follow each other in a shard and are never cut, by however many ranks: those of a
    row, or of its part on this mesh where columns are cut. 0 of what is no shard, 1 where none is known."""
    if not is_shard(param):
        return 0
    ours: Any = param
    cuts = [
        (placement.dim % param.dim(), ours.device_mesh.size(dim))
        for dim, placement in enumerate(ours.placements)
        if not placement.is_replicate()
    ]
    columns = [size for dim, size in cuts if dim != 0]
    if param.is_complex() or param.dim() < 2 or any(dim not in (0, param.dim() - 1) for dim, _ in cuts):
        return 1
    row = param.shape[1:].numel()
    if not columns:
        return row
    return row // math.prod(columns) if param.dim() == 2 and row % math.prod(columns) == 0 else 1


def rows_of_blocks(param: Tensor, block: int) -> torch.Size:
    """The shape of one number a block of a shard's whole parameter, whose ``uncut`` are whole blocks."""
    return torch.Size([param.shape[0], param.shape[1:].numel() // block])


def _placements(param: Tensor) -> Sequence[Any]:
    found: Any = param
    placements: Sequence[Any] = found.placements
    return placements


class Summed:
    """Norms and statistics of the parts that are here, made those of the whole: replicas count once.

    Every rank has to come with the same parameters.
    """

    def __init__(self, params: Sequence[Tensor], device: torch.device) -> None:
        of_groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for position, param in enumerate(params):
            if groups := _shard_groups(param):
                of_groups[groups].append(position)
        self._parts = [
            (torch.tensor(positions, device=device), groups) for groups, positions in of_groups.items()
        ]

    def rows(self, table: Tensor) -> None:
        """Statistics, a row of each parameter, in place."""
        for positions, groups in self._parts:
            sums, largest = table[positions].tensor_split([len(SUMS)], dim=1)
            sums, largest = sums.contiguous(), largest.contiguous()
            for group in groups:
                torch.distributed.all_reduce(sums, group=group)
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
            table[positions] = torch.cat([sums, largest], dim=1)

    def of(self, norms: Tensor, exact: torch.dtype) -> Tensor:
        """fp32, one of each parameter; ``exact``: what the device sums squares in."""
        if not self._parts:
            return norms
        norms = norms.clone()
        for positions, groups in self._parts:
            squares = norms[positions].to(exact).square_()
            for group in groups:
                torch.distributed.all_reduce(squares, group=group)
            norms[positions] = squares.sqrt_().float()
        return norms


def _shard_groups(param: Tensor) -> tuple[Any, ...]:
    """Of the processes that have other parts of it: one for each dimension of the mesh that cuts it."""
    if not is_shard(param):
        return ()
    ours: Any = param
    mesh = ours.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(ours.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )
