"""Host memory that a GPU copies from and to at full speed, of exactly the size that is asked for.

torch's own pinned allocator rounds every request up to a power of two. Here memory is mapped, touched by
several threads (which places the pages), and registered with the driver; it is unregistered and
unmapped when the last tensor on it is gone, and at exit.

A forked child does not have it: since Linux 5.9 a fork copies pinned pages at once, and every worker of a
DataLoader would take as much memory as all of them. A child that reads such a tensor nevertheless dies of it
(SIGSEGV); it may drop it. What torch's allocator or the system gives instead is not ours to advise about.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from adamw_triton.memory.lasting import lasting
from adamw_triton.memory.units import format_bytes

CHUNK = 16 << 30
"""Bytes registered at a time: drivers have refused single registrations from 512 GiB on."""
_TOUCHED_AT_ONCE = 64 << 20
_PORTABLE = 1  # pinned for every context of the process

_log = logging.getLogger("adamw_triton")
_told: set[str] = set()


class Registrar(Protocol):
    """Makes host memory known to a GPU's driver."""

    def register(self, address: int, size: int) -> str | None:
        """None, or why not."""

    def unregister(self, address: int) -> None: ...


class CudaRegistrar:
    """By the driver's interface: a refusal there leaves no error behind in CUDA's runtime, where the
    next kernel would report it as its own."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")

    def register(self, address: int, size: int) -> str | None:
        code = self._driver.cuMemHostRegister_v2(
            ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(_PORTABLE)
        )
        return None if code == 0 else f"cuMemHostRegister gave error {code}"

    def unregister(self, address: int) -> None:
        self._driver.cuMemHostUnregister(ctypes.c_void_p(address))


@lasting()
def host_bytes(size: int, device: torch.device) -> Tensor:
    """``size`` zeroed bytes on the host: pinned if ``device`` is a GPU, by torch's allocator if the driver
    refuses to register ours, and plain if that fails too (copies are slow then; it is logged)."""
    if size == 0 or device.type != "cuda":
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    torch.cuda.mem_get_info(device)  # a driver's call needs a context, which this makes
    try:
        registrar = CudaRegistrar()
    except OSError as error:  # ROCm
        return _by_torch(size, str(error))
    pinned = register_bytes(size, registrar, partial(torch.cuda.synchronize, device))
    return pinned if isinstance(pinned, Tensor) else _by_torch(size, pinned)


@lasting()
def register_bytes(
    size: int, registrar: Registrar, synchronize: Callable[[], None], *, chunk: int = CHUNK
) -> Tensor | str:
    """``size`` zeroed, registered bytes; or why the registrar refused, with nothing left behind.
    ``synchronize`` waits for the device that copies from and to them."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux
        mapping.madvise(mmap.MADV_DONTFORK)
    array = (ctypes.c_ubyte * size).from_buffer(mapping)
    tensor = torch.frombuffer(array, dtype=torch.uint8)
    _touch(tensor)
    start = ctypes.addressof(array)
    registered: list[int] = []
    for address in range(start, start + size, chunk):
        refusal = registrar.register(address, min(chunk, start + size - address))
        if refusal is not None:
            for done in registered:
                registrar.unregister(done)
            return refusal
        registered.append(address)
    # The mapping outlives its registration: the finalizer holds it.
    weakref.finalize(array, _release, registrar, registered, synchronize, mapping, os.getpid())
    return tensor


def registrations(host: Tensor) -> Iterator[slice]:
    """The parts of a flat tensor on such memory that each lie in one registration: a copy across the
    border of two is refused."""
    size = host.element_size()
    first = host.storage_offset() * size
    borders = range(first // CHUNK * CHUNK + CHUNK, first + host.numel() * size, CHUNK)
    at = [0, *((border - first) // size for border in borders), host.numel()]
    return (slice(start, stop) for start, stop in itertools.pairwise(at))


def _touch(tensor: Tensor) -> None:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        list(threads.map(Tensor.zero_, torch.split(tensor, _TOUCHED_AT_ONCE)))


def _release(
    registrar: Registrar,
    addresses: list[int],
    synchronize: Callable[[], None],
    mapping: mmap.mmap,
    pid: int,
) -> None:
    if os.getpid() != pid:  # a fork's copy: the registration is its parent's
        # So are the pages. Whatever the child has at these addresses by now, Python must not unmap.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))
        return
    synchronize()  # copies that are still queued read or write it
    for address in addresses:
        registrar.unregister(address)


def _by_torch(size: int, reason: str) -> Tensor:
    try:
        pinned = torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        _warn_once(
            f"{format_bytes(size)} of host memory could not be pinned ({reason}; {error}): paging works, at "
            "a fraction of the link's speed. Containers and WSL limit pinned memory: look at `ulimit -l`, "
            "docker's --ulimit memlock, and .wslconfig"
        )
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    _warn_once(
        f"registering host memory failed ({reason}): torch's pinned allocator is used, which takes up to "
        "twice the memory"
    )
    return pinned


def _warn_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _log.warning(message)
