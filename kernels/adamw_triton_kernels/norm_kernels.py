"""The norm of all gradients in one pass over them, and what it says of a step: kernels and launchers. Plain
torch: ``norms.py``.

A program takes one chunk of a gradient and leaves its norm; one program more makes one of all of these. No
atomics: the same bits every time.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from adamw_triton_kernels import launch
from adamw_triton_kernels.launch import ALIGNMENT, TL_DTYPES, Build, chunk_table
from adamw_triton_kernels.tables import DeviceTable, require_eager, send
from adamw_triton_kernels.work import AVERAGE, CLIP_EPS, WARM_UP, Adapting, Verdict

THREADS = 128
TILE = 2048
TOTAL_TILE = 1024
MAX_CHUNKS = 4096  # programs: a few for each place of the largest GPU, few enough for one program to add up
EPS = tl.constexpr(CLIP_EPS)


@dataclass(frozen=True)
class _Part:
    """Gradients of one dtype, all aligned or none promised to be: one launch."""

    build: Build
    key: tuple[object, ...]
    positions: tuple[int, ...]
    numels: torch.Tensor
    chunks: torch.Tensor
    chunk_size: int
    addresses: DeviceTable
    norms: torch.Tensor


class Norms:
    """Of the gradients of one device, of these lengths: the same set at every step, on one stream."""

    def __init__(
        self,
        numels: Sequence[int],
        device: torch.device,
        averages: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        """``averages``: of each gradient the step count and the running average, fp32 of no dimension. They
        stay where they are."""
        self._numels = numels
        self._device = device
        self._averages = averages
        self._scalars = torch.empty(0)
        self._ranges = torch.empty(0)
        self._kinds: list[tuple[torch.dtype, bool]] = []
        self._parts: list[_Part] = []
        self._norms = torch.empty(0)

    def of(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """fp32 [some], good until the next call: of each chunk of each gradient."""
        addresses = [grad.data_ptr() for grad in grads]
        kinds = [(g.dtype, at % ALIGNMENT == 0) for g, at in zip(grads, addresses, strict=True)]
        if kinds != self._kinds:
            self._divide(kinds)
        for part in self._parts:
            launch.load(part.build, part.key, self._device)
            own = part.addresses.of(array("q", [addresses[i] for i in part.positions]), capturable=True)
            arguments = (own, part.numels, part.chunks, part.norms, part.chunk_size)
            launch.call(part.build, part.key, self._device, len(part.chunks), arguments)
        return self._norms

    def adapt(
        self, norms: torch.Tensor, outcome: torch.Tensor, given: Adapting
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 [gradients]: their factors, and their averages after this step. See ``norms.Norms.adapt``."""
        spec = adapting_build(given.loss_scale is not None)
        key = ("adapting", *spec.constexprs.values())
        launch.load(spec, key, self._device)
        count = len(self._averages)
        factors, averages = torch.empty((2, -(-count // 4) * 4), device=self._device)[:, :count]
        scale = outcome if given.loss_scale is None else given.loss_scale  # not read then
        arguments = (self._scalars, self._ranges, norms, scale, outcome, factors, averages, given.factor)
        launch.call(spec, key, self._device, count, arguments)
        return factors, averages

    def _divide(self, kinds: list[tuple[torch.dtype, bool]]) -> None:
        require_eager()
        members: dict[tuple[torch.dtype, bool], list[int]] = defaultdict(list)
        for position, kind in enumerate(kinds):
            members[kind].append(position)
        tables = []
        for (dtype, aligned), positions in members.items():
            numels = [self._numels[i] for i in positions]
            chunks, chunk_size = chunk_table(numels, TILE, MAX_CHUNKS)
            tables.append((build(dtype, aligned), positions, numels, chunks, chunk_size))
        # Each begins at a multiple of 16 bytes; what is between is a norm of 0.
        rooms = [-(-len(chunks) // 4) * 4 for *_, chunks, _ in tables]
        self._norms = torch.zeros(max(sum(rooms), 1), dtype=torch.float32, device=self._device)
        self._parts = []
        begin = 0
        for room, (spec, positions, numels, chunks, chunk_size) in zip(rooms, tables, strict=True):
            self._parts.append(
                _Part(
                    spec,
                    ("norms", spec.constexprs["GRAD"], spec.constexprs["GRAD_ALIGN"]),
                    tuple(positions),
                    send(torch.tensor(numels, dtype=torch.int64, device="cpu"), self._device),
                    send(chunks, self._device),
                    chunk_size,
                    DeviceTable(self._device),
                    self._norms[begin : begin + room],
                )
            )
            begin += room
        self._kinds = kinds
        if self._averages:
            self._send_places()

    def _send_places(self) -> None:
        """Of each gradient where its scalars are, and which of the norms are its own."""
        places = [[step.data_ptr(), average.data_ptr()] for step, average in self._averages]
        self._scalars = send(torch.tensor(places, dtype=torch.int64, device="cpu"), self._device)
        ranges = torch.zeros((len(places), 2), dtype=torch.int32, device="cpu")
        for part in self._parts:
            first = int(part.norms.storage_offset())
            counts = torch.bincount(part.chunks[:, 0].cpu(), minlength=len(part.positions))
            ends = counts.cumsum(0) + first
            ranges[list(part.positions)] = torch.stack([ends - counts, ends], dim=1).int()
        self._ranges = send(ranges, self._device)


def verdict(norms: torch.Tensor, given: Verdict) -> torch.Tensor:
    """fp32 [2]: the factor of all gradients, and their norm. See ``norms.verdict``."""
    device = norms.device
    spec = verdict_build(given.max_norm is not None, given.skipped is not None, given.loss_scale is not None)
    key = ("verdict", *spec.constexprs.values())
    launch.load(spec, key, device)
    outcome = torch.empty(2, dtype=torch.float32, device=device)
    scale = norms if given.loss_scale is None else given.loss_scale  # not read then
    skipped = outcome if given.skipped is None else given.skipped
    most = 0.0 if given.max_norm is None else given.max_norm
    launch.call(spec, key, device, 1, (norms, scale, outcome, skipped, len(norms), most))
    return outcome


def build(grad_dtype: torch.dtype, aligned: bool = True) -> Build:
    """The specialization for gradients of this dtype."""
    constexprs = {
        "GRAD": TL_DTYPES[grad_dtype],
        "GRAD_ALIGN": ALIGNMENT if aligned else grad_dtype.itemsize,
        "TILE": TILE,
    }
    tables = {"addresses": "*i64", "numels": "*i64", "chunks": "*i32", "norms": "*fp32", "chunk_size": "i32"}
    signature = {**tables, **dict.fromkeys(constexprs, "constexpr")}
    return Build(_norms, signature, constexprs, THREADS)


def verdict_build(clips: bool, skips: bool, scaled: bool) -> Build:
    constexprs = {"CLIPS": clips, "SKIPS": skips, "SCALED": scaled, "TILE": TOTAL_TILE}
    pointers = {"norms": "*fp32", "loss_scale": "*fp32", "outcome": "*fp32", "skipped": "*fp32"}
    scalars = {"count": "i32", "max_norm": "fp32"}
    signature = {**pointers, **scalars, **dict.fromkeys(constexprs, "constexpr")}
    return Build(_verdict, signature, constexprs, THREADS)


def adapting_build(scaled: bool) -> Build:
    constexprs = {"WARM_UP": WARM_UP, "AVERAGE": AVERAGE, "SCALED": scaled, "TILE": TOTAL_TILE}
    pointers = ("norms", "loss_scale", "outcome", "own", "averages")
    signature = {
        "scalars": "*i64",
        "ranges": "*i32",
        **dict.fromkeys(pointers, "*fp32"),
        "factor": "fp32",
        **dict.fromkeys(constexprs, "constexpr"),
    }
    return Build(_adapting, signature, constexprs, THREADS)


@triton.jit
def _power_below(x):
    """Bits of the largest power of two that is not more than |x|: of 0 they are 0, and at most 2**126."""
    return tl.minimum(x.to(tl.uint32, bitcast=True) & 0x7F800000, 0x7E800000)


@triton.jit
def _add(x, squares, unit):
    """The squares of one tile more, in units of ``unit**2``; both new."""
    before = unit.to(tl.float32, bitcast=True)
    unit = tl.maximum(unit, _power_below(tl.max(tl.abs(x), 0)))
    per_unit = (0x7F000000 - unit).to(tl.float32, bitcast=True)
    shrink = before * per_unit
    x *= per_unit
    return tl.fma(x, x, squares * (shrink * shrink)), unit


@triton.jit
def _root(squares, unit):
    return unit.to(tl.float32, bitcast=True) * tl.sqrt(tl.sum(squares, 0))


@triton.jit(do_not_specialize=["chunk_size"])
def _norms(
    addresses, numels, chunks, norms, chunk_size,
    GRAD: tl.constexpr, GRAD_ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk)
    start = tl.multiple_of(tl.load(chunks + 2 * chunk + 1).to(tl.int64) * chunk_size, 128)
    grad = tl.load(addresses + tensor).to(tl.pointer_type(GRAD))
    grad = tl.multiple_of(grad, GRAD_ALIGN) + start
    count = tl.minimum(tl.load(numels + tensor) - start, chunk_size).to(tl.int32)
    squares = tl.zeros([TILE], tl.float32)
    unit = tl.zeros([], tl.uint32)
    at = tl.arange(0, TILE)
    for begin in range(0, count - TILE + 1, TILE):
        squares, unit = _add(tl.load(grad + begin + at).to(tl.float32), squares, unit)
    for begin in range(count - count % TILE, count, TILE):
        x = tl.load(grad + begin + at, begin + at < count, 0)
        squares, unit = _add(x.to(tl.float32), squares, unit)
    tl.store(norms + chunk, _root(squares, unit))


@triton.jit(do_not_specialize=["count", "max_norm"])
def _verdict(
    norms, loss_scale, outcome, skipped, count, max_norm,
    CLIPS: tl.constexpr, SKIPS: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    if SKIPS:  # read by all threads: before the barriers of the sum, for one of them is to write there
        before = tl.load(skipped)
    squares = tl.zeros([TILE], tl.float32)
    unit = tl.zeros([], tl.uint32)
    at = tl.arange(0, TILE)
    for begin in range(0, count, TILE):
        squares, unit = _add(tl.load(norms + begin + at, begin + at < count, 0), squares, unit)
    norm = _root(squares, unit)
    if SCALED:
        norm /= tl.load(loss_scale)
    factor = 1.0
    if CLIPS:
        factor = max_norm / (norm + EPS)
        factor = tl.where(factor > 1, 1.0, factor)  # NaN stays
    if SKIPS:
        bad = norm - norm != 0
        factor = tl.where(bad, -1.0, factor)
        tl.store(skipped, before + bad.to(tl.float32))
    tl.store(outcome, factor)
    tl.store(outcome + 1, norm)


@triton.jit(do_not_specialize=["factor"])
def _adapting(
    scalars, ranges, norms, loss_scale, outcome, own, averages, factor,
    WARM_UP: tl.constexpr, AVERAGE: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0)
    step = tl.load(tl.load(scalars + 2 * tensor).to(tl.pointer_type(tl.float32)))
    average = tl.load(tl.load(scalars + 2 * tensor + 1).to(tl.pointer_type(tl.float32)))
    end = tl.load(ranges + 2 * tensor + 1)
    squares = tl.zeros([TILE], tl.float32)
    unit = tl.zeros([], tl.uint32)
    at = tl.arange(0, TILE)
    for begin in range(tl.load(ranges + 2 * tensor), end, TILE):
        squares, unit = _add(tl.load(norms + begin + at, begin + at < end, 0), squares, unit)
    norm = _root(squares, unit)
    if SCALED:
        norm /= tl.load(loss_scale)
    fresh = average == float("inf")
    limit = factor * average
    chosen = tl.where((step >= WARM_UP) & (average < float("inf")) & (norm > limit), limit / norm, 1.0)
    of_all = tl.load(outcome)
    chosen = tl.where(chosen < of_all, chosen, of_all)  # SKIP and NaN stay
    held = chosen * norm
    mixed = tl.where(fresh, held, tl.fma(average - held, AVERAGE, held))
    new = tl.where(step < WARM_UP, tl.minimum(average, held), mixed)
    new = tl.where((held > 0) & (held - held == 0), new, average)
    tl.store(own + tensor, chosen)
    tl.store(averages + tensor, new)
