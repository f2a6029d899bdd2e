"""Triton's driver of an NVIDIA GPU that is not here: what is launched on it, the emulator runs.

Of the launcher nothing is replaced: it compiles as on a GPU, gets Triton's own compiled kernel, and calls
that with its list of arguments. What arrives here is what would go to the CUDA driver.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from bench.ptx.program import PtxError
from bench.ptx.warps import WARP

_REGISTERS, _SHARED = 65536, 64 << 10
"""Of a multiprocessor, and bytes a program may take on the smallest of all GPUs, sm_75."""
_LOADED = (1, 2, 32, 0, 1024)[: 5 if "n_max_threads" in CompiledKernel._init_handles.__code__.co_names else 4]
"""Of a loaded kernel: module, function, registers, spills and, for newer Tritons, the most threads."""
_SCRATCH = 2
"""Parameters that Triton adds: memory that these kernels do not ask for."""


class Runs(Protocol):
    """What takes the launches: a `session.Session`."""

    capability: int

    def run(self, kernel: Launcher, programs: int, arguments: list[Any]) -> None: ...


class Driver:
    """What Triton asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, WARP)
        self.session: Runs | None = None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": _SHARED, "warpSize": WARP, "max_num_regs": _REGISTERS,
            },
            load_binary=lambda name, binary, shared, device: _LOADED,
            unload_module=lambda module: None,
        )  # fmt: skip

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """A device for each target: Triton keeps its compiled kernels by device."""
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(self, source, metadata)


class Launcher:
    """A compiled kernel that can be launched."""

    def __init__(self, driver: Driver, source: Any, metadata: Any) -> None:
        self._driver = driver
        self.signature: Mapping[str, str] = source.signature
        """Type of each argument, ``constexpr`` for constants."""
        self.constants = {source.fn.arg_names[at[0]]: value for at, value in source.constants.items()}
        self.shared_bytes = int(metadata.shared)
        self.ptx = _kept(metadata, "ptx").decode()
        self.cubin = _kept(metadata, "cubin")

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        """As Triton calls it: stream, function, metadata of two kinds and two hooks, then the arguments."""
        session = self._driver.session
        if session is None:
            target = self._driver.target.arch
            raise RuntimeError(f"a kernel of sm_{target} is launched outside of compiled({target})")
        if (y, z) != (1, 1):
            raise PtxError(f"a grid of {(x, y, z)}: more than one dimension is not modelled")
        session.run(self, x, list(rest[6:]))

    def numbers(self, arguments: list[Any]) -> list[int]:
        """What the kernel's parameters are given: addresses, and integers that fit.

        Raises:
            TypeError: an argument too many or too few, or one of another type than was compiled for.
        """
        if len(arguments) != len(self.signature):
            raise TypeError(f"{len(arguments)} arguments for {len(self.signature)}: {[*self.signature]}")
        given = []
        for (name, kind), value in zip(self.signature.items(), arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*") != isinstance(value, torch.Tensor):
                raise TypeError(f"argument {name} is {kind}, got {type(value).__name__}")
            if isinstance(value, torch.Tensor):
                given.append(value.data_ptr())
                continue
            if kind == "fp32":
                given.append(*struct.unpack("<I", struct.pack("<f", value)))
                continue
            bits = int(kind[1:])
            if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
                raise TypeError(f"argument {name} is {kind}, which {value} does not fit")
            given.append(int(value))
        return given + [0] * _SCRATCH


def _kept(metadata: Any, kind: str) -> bytes:
    """What Triton's cache has of a kernel."""
    file = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.{kind}")
    if file is None:
        raise PtxError(f"Triton has not kept the {kind} of {metadata.name}")
    return Path(file).read_bytes()


@contextlib.contextmanager
def running(session: Runs) -> Iterator[None]:
    """Within, kernels that are launched on CPU tensors are ``session``'s."""
    ours = _drivers.setdefault(session.capability, Driver(session.capability))
    outer = _active[-1] if _active else None
    cuda = {
        "device": lambda device: contextlib.nullcontext(),
        "get_device_properties": lambda device: SimpleNamespace(warp_size=WARP),
    }
    kept = {name: getattr(torch.cuda, name) for name in cuda}, ours.session
    vars(torch.cuda).update(cuda)
    ours.session = session
    _active.append(ours)
    driver.set_active(ours)
    try:
        yield
    finally:
        _active.pop()
        vars(torch.cuda).update(kept[0])
        ours.session = kept[1]
        if outer is not None:
            driver.set_active(outer)
        else:
            with contextlib.suppress(RuntimeError):  # without a GPU there is no other
                driver.reset_active()


_drivers: dict[int, Driver] = {}
_active: list[Driver] = []
