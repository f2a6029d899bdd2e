"""One launch for many tensors: the tables a kernel reads, and the compiled kernel, called directly.

A program of the grid takes one *chunk*: a run of elements of one tensor. Five tables say which:

- ``addresses`` int64 [2, n]: of each parameter and its gradient; sent when one has moved
- ``tensors`` int64 [n, 5]: first element in the state arrays, number of elements, index of the first
  element in the whole parameter, row of its hyperparameters, its factor
- ``chunks`` int32 [number of chunks, 2]: (tensor, chunk of that tensor)
- ``hyper`` fp32 [rows, 8]: ``work.hyper_table``; sent at every step, unless it is made on the device
- ``factors`` fp32: what gradients are multiplied by, worked out on the device; ``SKIP`` leaves a tensor alone
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adamw_triton_kernels.statistic_kernels import totals
from adamw_triton_kernels.statistics import WIDTH
from adamw_triton_kernels.tables import DeviceTable, require_eager, send
from adamw_triton_kernels.work import MASTER, REMAINDER, Addresses, Arrays, Call, Layout, in_turn

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
ALIGNMENT = 16
"""Bytes: the widest access of a thread."""

KEPT = {REMAINDER: "*i16", MASTER: "*fp32"}
"""Of the state array that goes with a weight, by how weights are kept."""
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def locate(
    addresses, tensors, chunks, factors, n_tensors, chunk_size,
    PARAM: tl.constexpr, GRAD: tl.constexpr, PARAM_ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr,
):  # fmt: skip
    """This program's chunk: pointers to its first parameter and gradient, the index of its first
    element in the state arrays, how many elements are to be updated, the index of the first in the whole
    parameter, the row of its hyperparameters, its factor, and how many elements it has. Offsets are 64-bit,
    counts are 32-bit.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk)
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * chunk_size
    # Whole tiles. Alignment is seen by the compiler only if it is said of a pointer, and of each
    # number that came out of memory.
    start = tl.multiple_of(start, 128)
    param = (tl.load(addresses + tensor)).to(tl.pointer_type(PARAM))
    grad = (tl.load(addresses + n_tensors + tensor)).to(tl.pointer_type(GRAD))
    param = tl.multiple_of(param, PARAM_ALIGN) + start
    grad = tl.multiple_of(grad, GRAD_ALIGN) + start
    row = tensors + 5 * tensor
    offset = tl.multiple_of(tl.load(row), 32) + start
    here = tl.minimum(tl.load(row + 1) - start, chunk_size).to(tl.int32)
    first = tl.load(row + 2) + start
    factor = tl.load(factors + tl.load(row + 4))
    count = tl.where(factor < 0, 0, here)  # SKIP; a NaN goes into the update
    return param, grad, offset, count, first, tl.load(row + 3), factor, here


@dataclass(frozen=True)
class Build:
    """One specialization of a kernel: all that the compiler is told."""

    fn: Any
    signature: dict[str, str]
    """Type of each argument; ``constexpr`` for those in ``constexprs``."""
    constexprs: dict[str, Any]
    threads: int
    """Of a program. Their number fixes how many elements each holds, and so the width of accesses."""
    registers: int | None = None
    """Of a thread, at most; None: as the assembler likes."""

    @classmethod
    def of(
        cls,
        fn: Any,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        aligned: bool,
        state: Mapping[str, str],
        constexprs: Mapping[str, Any],
        threads: int,
        registers: int | None = None,
        tells: bool = False,
    ) -> Build:
        """``tells``: it leaves statistics, in a table more."""
        all_constexprs = {
            "PARAM": TL_DTYPES[param_dtype],
            "GRAD": TL_DTYPES[grad_dtype],
            "PARAM_ALIGN": ALIGNMENT if aligned else param_dtype.itemsize,
            "GRAD_ALIGN": ALIGNMENT if aligned else grad_dtype.itemsize,
            **constexprs,
        }
        left = {"left": "*fp32"} if tells else {}
        if not tells:
            all_constexprs = {"left": None, **all_constexprs}
        tables = {
            "addresses": "*i64",
            "tensors": "*i64",
            "chunks": "*i32",
            "hyper": "*fp32",
            "factors": "*fp32",
        }
        scalars = {"n_tensors": "i32", "chunk_size": "i32"}
        signature = {**tables, **state, **scalars, **left, **dict.fromkeys(all_constexprs, "constexpr")}
        return cls(fn, signature, all_constexprs, threads, registers)

    def num_warps(self, warp_size: int) -> int:
        return self.threads // warp_size

    def options(self, warp_size: int) -> dict[str, Any]:
        """Of the compiler. Multiply-adds are fused where the kernels say so, and nowhere else: what it would
        choose differs between targets, builds, loops and versions of Triton, and with it the last bit."""
        most = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps(warp_size), "enable_fp_fusion": False, **most}

    @property
    def tile(self) -> int:
        """Elements of one full tile."""
        return int(self.constexprs["TILE"])

    @property
    def attrs(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Every table and state array begins at a multiple of 16 bytes."""
        pointers = [i for i, kind in enumerate(self.signature.values()) if kind.startswith("*")]
        return {(i,): [["tt.divisibility", ALIGNMENT]] for i in pointers}

    def compiled(self, target: GPUTarget) -> Any:
        """Machine code. Triton's own entry would promise the compiler more, of whatever arguments came first:
        that storages have less than 2 GiB, on AMD. What is launched on any later ones is promised nothing but
        ``attrs``."""
        source = ASTSource(self.fn, self.signature, self.constexprs, self.attrs)
        return triton.compile(source, target=target, options=self.options(target.warp_size))


BuildFunction = Callable[..., Build]


def chunk_table(numels: Sequence[int], tile: int, max_chunks: int) -> tuple[torch.Tensor, int]:
    """The table ``chunks`` and the elements of a chunk, a multiple of ``tile``."""
    tiles = torch.tensor([-(-numel // tile) for numel in numels], dtype=torch.int64, device="cpu")
    tiles_per_chunk = -(-int(tiles.sum()) // max_chunks) or 1
    counts = -(-tiles // tiles_per_chunk)
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    within = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, within], dim=1).to(torch.int32), tiles_per_chunk * tile


class _Tables:
    """The tables of one layout on one device, and the launches that use them."""

    def __init__(self, layout: Layout, tile: int, device: torch.device, tells: bool) -> None:
        factors = layout.factors or [0] * len(layout.numels)
        rows = zip(layout.offsets, layout.numels, layout.firsts, layout.rows, factors, strict=True)
        self.tensors = send(torch.tensor(list(rows), dtype=torch.int64, device="cpu"), device)
        chunks, self.chunk_size = chunk_table(layout.numels, tile, layout.max_chunks)
        self.chunks = send(chunks, device)
        self.addresses = DeviceTable(device)
        self.ones = send(torch.ones(1, device="cpu"), device)
        self.left = _Left(chunks, layout.sums, device) if tells else None


class _Left:
    """What programs leave for statistics, and whose it is.

    Args:
        chunks: on the host.
        rows: of each tensor among the sums.
    """

    build = Build(
        totals,
        {"left": "*fp32", "ranges": "*i32", "rows": "*i32", "sums": "*fp32", "ROWS": "constexpr"},
        {"ROWS": 64},
        threads=128,
    )

    def __init__(self, chunks: torch.Tensor, rows: Sequence[int], device: torch.device) -> None:
        counts = torch.bincount(chunks[:, 0], minlength=len(rows))
        filled = counts > 0  # of an empty tensor there is nothing to say
        ends = counts.cumsum(0)[filled]
        ranges = torch.stack([ends - counts[filled], ends], dim=1).to(torch.int32)
        self._tensors = len(ends)
        self._ranges = send(ranges, device)
        self._rows = send(torch.tensor(rows, dtype=torch.int32, device="cpu")[filled], device)
        self._programs = len(chunks)
        self._device = device
        load(self.build, ("totals",), device)

    def room(self) -> torch.Tensor:
        """For a row of each program."""
        return torch.empty((max(self._programs, 1), WIDTH), dtype=torch.float32, device=self._device)

    def add(self, room: torch.Tensor, sums: torch.Tensor) -> None:
        """What the programs have left there, to the tensors' own rows."""
        arguments = (room, self._ranges, self._rows, sums)
        call(self.build, ("totals",), self._device, self._tensors, arguments)


def prepare(
    build: BuildFunction,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    names: Sequence[str],
    layout: Layout,
    hyper: torch.Tensor,
    factors: torch.Tensor | None,
    given: Addresses | None,
    sums: torch.Tensor | None = None,
    **variant: Any,
) -> Call:
    """All that can fail of running a kernel over the tensors of a layout: tables are sent, kernels compiled
    and loaded. What is returned launches.

    Args:
        params, grads: dense, all of one dtype each, on one device.
        names: of the state arrays, in the kernel's order.
        hyper: on their device or on the host.
        factors: on their device.
        given: addresses of params and grads; None: to be asked for.
        sums: on their device, what statistics are added to; None: there are none.
        variant: compile-time arguments of ``build``.
    """
    device = params[0].device
    if given is None:
        given = [t.data_ptr() for t in params], [t.data_ptr() for t in grads]
    addresses = array("q", given[0])
    addresses.extend(given[1])
    aligned = _all_aligned(layout, addresses)
    if not aligned and (parts := _parts(layout, addresses)):
        return in_turn(
            [
                prepare(
                    build,
                    [params[index] for index in indices],
                    [grads[index] for index in indices],
                    names,
                    part,
                    hyper,
                    factors,
                    None,
                    sums,
                    **variant,
                )
                for indices, part in parts
            ]
        )
    tells = sums is not None
    key = (build, params[0].dtype, grads[0].dtype, aligned, tells, *variant.values())
    found = layout.tables.get((device, key))
    if found is None:
        require_eager()
        spec = build(params[0].dtype, grads[0].dtype, aligned=aligned, TELLS=tells, **variant)
        found = layout.tables[device, key] = (_Tables(layout, spec.tile, device, tells), spec, key)
    tables, spec, key = found
    load(spec, key, device)
    made_there = hyper.device == device
    arguments = (
        tables.addresses.of(addresses, capturable=made_there),
        tables.tensors,
        tables.chunks,
        hyper if made_there else send(hyper, device),
        tables.ones if factors is None else factors,
    )
    scalars: tuple[Any, ...] = (len(params), tables.chunk_size)
    programs = len(tables.chunks)
    left = tables.left
    if left is not None:
        scalars = (*scalars, left.room())

    def launch(state: Arrays) -> None:
        call(spec, key, device, programs, (*arguments, *[state[name] for name in names], *scalars))
        if left is not None and sums is not None:
            left.add(scalars[-1], sums)

    return launch


def _all_aligned(layout: Layout, addresses: array[int]) -> bool:
    """Whether no tensor is misaligned. The last answer is kept."""
    known, aligned = layout.tables.get("aligned", (None, False))
    if known != addresses:
        # Counted, where a truth value would be read as if it were on a GPU: tests refuse that in a step.
        misaligned = (torch.frombuffer(addresses, dtype=torch.int64) % ALIGNMENT).nonzero()
        aligned = len(misaligned) == 0
        layout.tables["aligned"] = (addresses, aligned)
    return bool(aligned)


def _parts(layout: Layout, addresses: array[int]) -> list[tuple[tuple[int, ...], Layout]]:
    """The aligned tensors and the others, as indices and layouts of their own: a few misaligned ones are not
    to make the accesses of all of them narrow. Empty if all are misaligned. The last division is kept."""
    count = len(layout.numels)
    pairs = list(zip(addresses[:count], addresses[count:], strict=True))
    misaligned = tuple(index for index, (p, g) in enumerate(pairs) if (p | g) % ALIGNMENT)
    known, parts = layout.tables.get("parts", ((), []))
    if known != misaligned:
        apart = set(misaligned)
        rest = tuple(index for index in range(count) if index not in apart)
        parts = [(indices, layout.part(indices)) for indices in (rest, misaligned)] if rest else []
        layout.tables["parts"] = (misaligned, parts)
    return list(parts)


def load(spec: Build, key: tuple[Any, ...], device: torch.device) -> None:
    """Have a kernel compiled and its machine code on the device."""
    if INTERPRETED or (key, device) in _compiled:
        return
    with _compiling, torch.cuda.device(device):
        if (key, device) not in _compiled:
            require_eager()
            kernel = spec.compiled(triton.runtime.driver.active.get_current_target())
            kernel[(1, 1, 1)]  # loads it
            _compiled[key, device] = kernel


def call(
    spec: Build, key: tuple[Any, ...], device: torch.device, programs: int, arguments: tuple[Any, ...]
) -> None:
    """One launch of ``programs`` programs of a kernel that is loaded."""
    if programs == 0:  # every tensor is empty
        return
    if INTERPRETED:
        spec.fn[(programs,)](*arguments, **spec.constexprs)
        return
    with torch.cuda.device(device):
        # Called on the compiled kernel itself: Triton's own entry would bind, specialize and look up
        # every argument again, several times the cost of the launch.
        _compiled[key, device][(programs, 1, 1)](*arguments, *spec.constexprs.values())


_compiled: dict[Any, Any] = {}
_compiling = threading.Lock()
"""One thread compiles, others wait: for most of them it is the same kernel."""
