"""Pinned memory: exactly what was asked for, registered whole, and handed back once and in order. The driver
is a fake that writes down what it is told."""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import math
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamw_triton.memory import pinned
from adamw_triton.memory.pinned import CudaRegistrar, host_bytes, register_bytes, registrations
from tests.measuring import printed

PAGE = mmap.PAGESIZE
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Registrar:
    """Refuses the registration of that number, if one is named."""

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused
        self.chunks: list[tuple[int, int]] = []
        """Addresses and sizes, as registered."""
        self.log: list[object] = []
        """What happened when memory was handed back."""
        self.devices: list[torch.device] = []
        """That were waited for, where any was named."""

    def register(self, address: int, size: int) -> str | None:
        if len(self.chunks) == self.refused:
            return "no more"
        self.chunks.append((address, size))
        return None

    def unregister(self, address: int) -> None:
        assert is_mapped(address)
        self.log.append(address)

    def synchronize(self, *device: torch.device) -> None:
        self.log.append("synchronized")
        self.devices += device


def is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as lines:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(start <= address < stop for start, stop in ranges)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def registered(size: int, registrar: Registrar, chunk: int = pinned.CHUNK) -> Tensor:
    found = register_bytes(size, registrar, registrar.synchronize, chunk=chunk)
    assert isinstance(found, Tensor)
    return found


# What is given


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 7 * PAGE + 5, (65 << 20) + 3])
def test_exactly_as_many_zeros_as_asked_for(size: int) -> None:
    """And no power of two, as torch's allocator gives; they can be written, and begin at a page."""
    memory = registered(size, Registrar())
    assert memory.dtype == torch.uint8
    assert memory.shape == (size,)
    assert memory.untyped_storage().nbytes() == size
    assert memory.data_ptr() % PAGE == 0
    assert not memory.any()
    memory.fill_(7)
    assert bool((memory == 7).all())


def test_pages_are_in_place_before_they_are_registered() -> None:
    """All of them: else the driver's one thread would place them."""
    size = 200 << 20
    placed = []

    class Looking(Registrar):
        def register(self, address: int, size: int) -> str | None:
            placed.append(resident_bytes() - before)
            return super().register(address, size)

    gc.collect()
    before = resident_bytes()
    registered(size, Looking())
    assert placed[0] > 0.95 * size


@settings(deadline=None)
@given(st.integers(1, 40 * PAGE), st.integers(1, 12))
def test_chunks_cover_exactly_the_range(size: int, pages: int) -> None:
    registrar = Registrar()
    memory = registered(size, registrar, chunk=pages * PAGE)
    starts = [address for address, _ in registrar.chunks]
    ends = [address + length for address, length in registrar.chunks]
    assert starts == [memory.data_ptr(), *ends[:-1]]
    assert ends[-1] == memory.data_ptr() + size
    assert all(length == pages * PAGE for _, length in registrar.chunks[:-1])
    assert all(start % PAGE == 0 for start in starts)


def test_registrations_are_large_by_themselves() -> None:
    registrar = Registrar()
    registered(100 << 20, registrar)
    assert len(registrar.chunks) == 1


@pytest.mark.parametrize("refused", range(5))
def test_a_refusal_leaves_nothing_behind(refused: int) -> None:
    registrar = Registrar(refused)
    assert register_bytes(4 * PAGE + 1, registrar, registrar.synchronize, chunk=PAGE) == "no more"
    gc.collect()
    assert len(registrar.chunks) == refused
    assert registrar.log == [address for address, _ in registrar.chunks]


# How it is handed back


def test_the_last_view_hands_it_back() -> None:
    """At once, and in order: what is queued is waited for while all is registered; then each chunk goes."""
    registrar = Registrar()
    memory = registered(4 * PAGE + 1, registrar, chunk=PAGE)
    middle = memory[PAGE : 2 * PAGE].view(torch.float32).view(32, -1)
    array = middle[1:].numpy()
    del memory, middle
    gc.collect()
    assert registrar.log == []
    array[:] = 3  # still there
    del array
    assert registrar.log == ["synchronized", *(address for address, _ in registrar.chunks)]
    gc.collect()
    assert len(registrar.log) == 1 + 5


def test_each_piece_of_memory_is_handed_back_by_itself() -> None:
    registrars = [Registrar() for _ in range(3)]
    memories = [registered(2 * PAGE, registrar, chunk=PAGE) for registrar in registrars]
    del memories[1]
    assert [len(registrar.log) for registrar in registrars] == [0, 3, 0]


# A driver that writes down in the order of the process's own output what is handed back.
PRELUDE = """
import gc, json, os, sys
from pathlib import Path
from adamw_triton.memory.pinned import register_bytes

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

class Registrar:
    def register(self, address, size):
        say("register", address)
    def unregister(self, address):
        say("unregister", address)

PAGE = os.sysconf("SC_PAGESIZE")
"""

AT_EXIT = """
memory = register_bytes(3 * PAGE, Registrar(), lambda: say("synchronize"), chunk=2 * PAGE)
cycle = [memory]
cycle.append(cycle)
say("end")
"""

FORKED = """
memory = register_bytes(3 * PAGE, Registrar(), lambda: say("synchronize"), chunk=2 * PAGE)
for ways_out in ("del", "exit"):
    child = os.fork()
    if child == 0:
        if ways_out == "del":
            del memory
            gc.collect()
        say("child", ways_out)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
assert not memory.any()
say("end")
"""


def said_by(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def handed_back(registering: list[str]) -> list[str]:
    return ["synchronize", *(f"un{line}" for line in registering)]


@pytest.mark.slow
def test_the_interpreters_exit_hands_back_what_is_left() -> None:
    said = said_by(AT_EXIT)
    assert len(said) == 2 + 1 + 3
    assert said[2:] == ["end", *handed_back(said[:2])]


@pytest.mark.slow
def test_a_forked_child_hands_nothing_back() -> None:
    """Neither when its copy of the last tensor goes, nor when it exits: the registration is its parent's."""
    said = said_by(FORKED)
    assert said[2:] == ["child del", "child exit", "end", *handed_back(said[:2])]


HOLE = """
import mmap
memory = register_bytes(64 * PAGE, Registrar(), lambda: None)
address = memory.data_ptr()

def flags():
    found = False
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            found = start <= address < end
        elif found and head == "VmFlags:":
            return line.split()[1:]
    return None

say("dc" in flags())
child = os.fork()
if child == 0:
    say(flags())
    import ctypes
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
    PRIVATE_ANONYMOUS_FIXED = 0x32
    taken = libc.mmap(address, 64 * PAGE, 3, PRIVATE_ANONYMOUS_FIXED, -1, 0)
    assert taken == address  # as the next allocation in the child may
    ctypes.memset(address, 7, 64 * PAGE)
    del memory
    gc.collect()
    say(ctypes.string_at(address, 64 * PAGE) == bytes([7]) * 64 * PAGE)
    sys.exit(0)
_, status = os.waitpid(child, 0)
say(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="not Linux")
def test_a_forked_child_has_no_copy_and_keeps_what_it_puts_there() -> None:
    """Pinned pages would be copied at once. Where they were, the child has room for others, which the
    parent's tensor does not unmap when the child drops it."""
    said = said_by(HOLE)
    assert [line for line in said if "register" not in line] == ["True", "None", "True", "0"]


REPEAT = """
class Quiet:
    def __init__(self, refused):
        self.refused = refused
    def register(self, address, size):
        return "no more" if self.refused else None
    def unregister(self, address):
        pass

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

gc.disable()
sizes = []
for refused in [False] * 50 + [True] * 3:
    memory = register_bytes(64 << 20, Quiet(refused), lambda: None)
    del memory
    sizes.append(resident())
print(json.dumps(max(sizes[1:]) - sizes[0]))
"""


@pytest.mark.slow
def test_fifty_pieces_of_memory_and_three_refused_ones_leave_none_behind() -> None:
    assert int(printed(PRELUDE + REPEAT)) < 8 << 20


# Parts that lie in one registration

DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float32)


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """A range of a flat tensor, where it begins in bytes, and how much is registered at a time."""
    dtype = draw(st.sampled_from(DTYPES))
    base = torch.zeros(draw(st.integers(0, 3000)), dtype=dtype)
    start, stop = sorted(draw(st.integers(0, len(base))) for _ in range(2))
    chunk = 4 * draw(st.integers(1, 1000))
    return base[start:stop], start * dtype.itemsize, chunk


@given(views())
def test_parts_cover_a_tensor_and_cross_no_border(view: tuple[Tensor, int, int]) -> None:
    """And there are no more of them than chunks."""
    tensor, first, chunk = view
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned, "CHUNK", chunk)
        parts = list(registrations(tensor))
    assert parts[0].start == 0
    assert parts[-1].stop == len(tensor)
    assert all(before.stop == after.start for before, after in itertools.pairwise(parts))
    chunks = []
    for part in parts:
        if part.start < part.stop or len(parts) > 1:
            begin, end = (first + at * tensor.itemsize for at in (part.start, part.stop))
            assert begin // chunk == (end - 1) // chunk
            chunks.append(begin // chunk)
    assert chunks == sorted(set(chunks))


def test_parts_of_views_lie_in_chunks_as_they_were_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The borders that are reckoned with are those of the addresses that the driver was told."""
    monkeypatch.setattr(pinned, "CHUNK", 2 * PAGE)
    registrar = Registrar()
    memory = registered(7 * PAGE, registrar, chunk=pinned.CHUNK)
    view = memory[PAGE:].view(torch.bfloat16)[16 : 2 * PAGE + 16]
    parts = [view[part] for part in registrations(view)]
    assert [part.nbytes for part in parts] == [PAGE - 32, 2 * PAGE, PAGE + 32]
    for part in parts:
        begin, end = part.data_ptr(), part.data_ptr() + part.nbytes
        assert any(start <= begin and end <= start + size for start, size in registrar.chunks)


def test_the_border_is_where_chunks_end_by_themselves() -> None:
    memory = torch.empty(6 << 30, dtype=torch.float32, device="meta")  # 24 GiB
    assert list(registrations(memory[10:])) == [
        slice(0, (4 << 30) - 10),
        slice((4 << 30) - 10, (6 << 30) - 10),
    ]


# Which memory a device gets


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings, as if none had been given before."""
    monkeypatch.setattr(pinned, "_told", set())
    caplog.set_level(logging.INFO, logger="adamw_triton")
    messages: list[str] = []
    monkeypatch.setattr(caplog.handler, "emit", lambda record: messages.append(record.getMessage()))
    return messages


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Registrar:
    """As if there were a GPU, with a driver of ours."""
    registrar = Registrar()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", registrar.synchronize)
    monkeypatch.setattr(pinned, "CudaRegistrar", lambda: registrar)
    return registrar


def is_plain(memory: Tensor, size: int) -> bool:
    return memory.device == CPU and memory.shape == (size,) and not memory.any() and not memory.is_pinned()


@pytest.mark.parametrize("size", [0, 1, 12345])
def test_the_cpus_own_state_is_plain_memory(size: int, driver: Registrar, told: list[str]) -> None:
    memory = host_bytes(size, CPU)
    assert memory.dtype == torch.uint8
    assert is_plain(memory, size)
    assert driver.chunks == []
    assert told == []


def test_a_gpus_state_is_registered(driver: Registrar, told: list[str]) -> None:
    memory = host_bytes(12345, CUDA)
    assert driver.chunks == [(memory.data_ptr(), 12345)]
    assert told == []
    del memory
    assert driver.log == ["synchronized", driver.chunks[0][0]]


def test_memory_waits_for_the_gpu_that_uses_it(driver: Registrar) -> None:
    """Not for whichever is current when it is handed back."""
    memories = {index: host_bytes(100, torch.device("cuda", index)) for index in range(3)}
    for index in (2, 0, 1):
        del memories[index]
    assert driver.devices == [torch.device("cuda", index) for index in (2, 0, 1)]


def test_no_bytes_need_no_driver(driver: Registrar) -> None:
    assert host_bytes(0, CUDA).shape == (0,)
    assert driver.chunks == []


@pytest.mark.parametrize("reason", ["no more", "libcuda.so.1: no such file"])
@pytest.mark.parametrize("torch_pins", [True, False])
def test_what_the_driver_refuses_torch_may_pin(
    reason: str,
    torch_pins: bool,
    driver: Registrar,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And where there is no such driver (ROCm). Else it is plain memory. Either is told, once."""
    driver.refused = 0
    if reason != "no more":
        monkeypatch.setattr(pinned, "CudaRegistrar", no_driver)
    asked = []
    zeros = torch.zeros

    def pinning_zeros(*size: int, pin_memory: bool = False, **arguments: Any) -> Tensor:
        asked.append(pin_memory)
        if pin_memory and not torch_pins:
            raise RuntimeError("torch cannot either")
        return zeros(*size, **arguments)

    monkeypatch.setattr(torch, "zeros", pinning_zeros)
    for _ in range(2):
        assert is_plain(host_bytes(12345, CUDA), 12345)  # here: pinned only as far as the fake says
    if torch_pins:
        assert asked == [True, True]
        assert told == [
            f"registering host memory failed ({reason}): torch's pinned allocator is used, which takes up to "
            "twice the memory"
        ]
    else:
        assert asked == [True, False] * 2
        (message,) = told
        assert message.startswith(
            f"12.1 KiB of host memory could not be pinned ({reason}; torch cannot either): paging works"
        )


def no_driver() -> Registrar:
    raise OSError("libcuda.so.1: no such file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can pin memory here")
def test_where_torch_really_cannot_pin_memory_is_plain(told: list[str]) -> None:
    """One warning for two calls."""
    for _ in range(2):
        assert is_plain(pinned._by_torch(5000, "no more"), 5000)
    (message,) = told
    assert "4.9 KiB of host memory could not be pinned (no more; " in message
    assert "`ulimit -l`" in message


# CUDA's driver


class Driver:
    """libcuda, as ctypes shows it."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.calls: list[tuple[str, list[tuple[type, int]]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, [(type(argument), argument.value) for argument in arguments]))
            return self.code

        return call


@pytest.mark.parametrize(("code", "answer"), [(0, None), (2, "cuMemHostRegister gave error 2")])
def test_the_driver_is_given_whole_addresses(
    code: int, answer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ctypes would cut bare integers to 32 bits. The memory is pinned for all GPUs: flag 1."""
    driver = Driver(code)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver if name == "libcuda.so.1" else None)
    registrar = CudaRegistrar()
    address, size = (1 << 46) + PAGE, 3 << 40
    assert registrar.register(address, size) == answer
    registrar.unregister(address)
    assert driver.calls == [
        (
            "cuMemHostRegister_v2",
            [(ctypes.c_void_p, address), (ctypes.c_size_t, size), (ctypes.c_uint, 1)],
        ),
        ("cuMemHostUnregister", [(ctypes.c_void_p, address)]),
    ]


def test_chunks_are_whole_pages() -> None:
    """Of every size that an operating system has, and of huge ones."""
    assert math.gcd(pinned.CHUNK, 1 << 30) == 1 << 30
