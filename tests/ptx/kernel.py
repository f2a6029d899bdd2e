"""A kernel of two warps around a body, for the tests of the emulator."""

from __future__ import annotations

import struct

import numpy as np

from bench.ptx.emulator import Emulator
from bench.ptx.floats import Approximation
from bench.ptx.memory import GlobalMemory, Range, SharedMemory
from bench.ptx.parser import parse

HEAD = """
.version 8.8
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %h<99>;
    .reg .b32 %r<99>;
    .reg .b64 %d<99>;
    ld.param.b64 %d1, [kernel_param_0];
    ld.param.b64 %d2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r2, %r3, %r1;
    mul.wide.u32 %d3, %r4, 16;
    add.s64 %d4, %d1, %d3;
    mul.wide.u32 %d5, %r4, 4;
    add.s64 %d6, %d2, %d5;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d4];
"""
TAIL = """
    st.global.b32 [%d6], %r20;
    ret;
}
"""


def run(
    body: str, inputs: np.ndarray, ctas: int = 1, races: bool = False, flush: bool = True, shared: int = 1024
) -> tuple[np.ndarray, GlobalMemory, list[SharedMemory]]:
    """Each thread has four 32-bit numbers in %r10...%r13 and leaves one in %r20."""
    given = np.zeros((64 * ctas, 4), dtype=np.uint32)
    given[: len(inputs)] = inputs
    result = np.zeros(64 * ctas, dtype=np.uint32)
    memory = GlobalMemory(
        [
            Range(given.ctypes.data, given.nbytes, "given", False),
            Range(result.ctypes.data, result.nbytes, "result"),
        ],
        races,
    )
    emulator = Emulator(parse(HEAD + body + TAIL), Approximation(flush=flush))
    used = emulator.launch(ctas, [given.ctypes.data, result.ctypes.data], memory, shared)
    return result[: len(inputs)], memory, used


def bits(*numbers: float) -> list[int]:
    return [struct.unpack("<I", struct.pack("<f", x))[0] for x in numbers]


def value(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", int(word)))[0]


def interesting(count: int, seed: int = 0) -> np.ndarray:
    """fp32 bit patterns: random ones, of near magnitudes, and every kind of special number."""
    rng = np.random.default_rng(seed)
    special = np.array(
        [
            0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F7FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001,
            0x477FF000, 0x33000000, 0x38800000, 0x387FC000,
        ],
        dtype=np.uint32,
    )  # fmt: skip
    special = np.concatenate([special, special | 0x80000000])
    near = rng.normal(size=count).astype(np.float32).view(np.uint32)
    anything = rng.integers(0, 1 << 32, size=count, dtype=np.uint64).astype(np.uint32)
    return rng.permutation(np.concatenate([special, near, anything]))[:count]
