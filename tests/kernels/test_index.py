"""Which elements each program takes: exact beyond 2**31 elements, without the memory for them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from adamw_triton_kernels.launch import chunk_table, locate
from adamw_triton_kernels.work import MAX_CHUNKS, SKIP

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@triton.jit
def _store_located(
    addresses, tensors, chunks, factors, n_tensors, chunk_size, out,
    PARAM: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    param, grad, offset, count, first, row, factor, _ = locate(
        addresses, tensors, chunks, factors, n_tensors, chunk_size, PARAM, GRAD, 4, 2
    )
    out += 7 * tl.program_id(0)
    tl.store(out, param.to(tl.int64))
    tl.store(out + 1, grad.to(tl.int64))
    tl.store(out + 2, offset)
    tl.store(out + 3, count.to(tl.int64))
    tl.store(out + 4, first)
    tl.store(out + 5, row)
    tl.store(out + 6, factor.to(tl.int64))


def located(
    addresses: list[int],
    rows: list[tuple[int, int, int, int, int]],
    chunks: torch.Tensor,
    size: int,
    device: str,
) -> list[list[int]]:
    """Parameter's and gradient's address, offset, count, first, row and factor of each chunk. Factors are
    three times their numbers, the last is ``SKIP``."""
    factors = torch.arange(0.0, 3.0 * len(rows) + 3, 3.0)
    factors[-1] = SKIP
    out = torch.zeros(len(chunks), 7, dtype=torch.int64, device=device)
    _store_located[(len(chunks),)](
        torch.tensor(addresses, dtype=torch.int64, device=device),
        torch.tensor(rows, dtype=torch.int64, device=device),
        chunks.contiguous().to(device),
        factors.to(device),
        len(rows),
        size,
        out,
        tl.float32,
        tl.bfloat16,
    )
    return out.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_first_and_last_chunk_of_a_huge_tensor(device: str) -> None:
    numel = 2**33 + 5
    small, param, grad = 1 << 20, 1 << 44, 1 << 45
    offset, first = 128, 2**34
    chunks, size = chunk_table([100, numel], tile=2048, max_chunks=MAX_CHUNKS)
    ends = chunks[[0, 1, 2, -1]]
    found = located(
        [small, param, small, grad], [(0, 100, 0, 1, 1), (offset, numel, first, 0, 0)], ends, size, device
    )
    last = (numel - 1) // size * size
    assert last > 2**32
    assert found == [
        [small, small, 0, 100, 0, 1, 3],
        [param, grad, offset, size, first, 0, 0],
        [param + 4 * size, grad + 2 * size, offset + size, size, first + size, 0, 0],
        [param + 4 * last, grad + 2 * last, offset + last, numel - last, first + last, 0, 0],
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numels", [[1, 300, 128, 129, 0, 1000], [2049], [128] * 9])
@pytest.mark.parametrize("max_chunks", [1, 3, 1000])
def test_programs_cover_every_element_once(numels: list[int], max_chunks: int, device: str) -> None:
    chunks, size = chunk_table(numels, tile=128, max_chunks=max_chunks)
    offsets = torch.tensor(numels).div(128, rounding_mode="floor").add(1).mul(128).cumsum(0).tolist()
    rows = [
        (offset, numel, 7 * i, i, i) for i, (offset, numel) in enumerate(zip(offsets, numels, strict=True))
    ]
    bases = [1 << 30 | i << 20 for i in range(2 * len(numels))]
    taken: list[list[int]] = [[] for _ in numels]
    for param, grad, offset, count, first, row, factor in located(bases, rows, chunks, size, device):
        start = offset - offsets[row]
        assert (param, grad) == (bases[row] + 4 * start, bases[len(numels) + row] + 2 * start)
        assert (first, factor) == (7 * row + start, 3 * row)
        taken[row].extend(range(start, start + count))
    assert taken == [list(range(numel)) for numel in numels]


@pytest.mark.parametrize("device", DEVICES)
def test_a_skipped_tensor_has_no_elements(device: str) -> None:
    chunks, size = chunk_table([300, 300], tile=128, max_chunks=8)
    found = located([1 << 30] * 4, [(0, 300, 0, 0, 0), (384, 300, 0, 0, 2)], chunks, size, device)
    assert [sum(row[3] for row in found if row[-1] == factor) for factor in (0, SKIP)] == [300, 0]


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=20),
    st.integers(1, 12),
    st.sampled_from([1, 128, 256]),
)
def test_the_chunk_table_covers_every_element_once(numels: list[int], max_chunks: int, tile: int) -> None:
    chunks, size = chunk_table(numels, tile, max_chunks)
    assert chunks.dtype == torch.int32
    assert size % tile == 0
    taken: list[list[int]] = [[] for _ in numels]
    for tensor, within in chunks.tolist():
        elements = range(within * size, min((within + 1) * size, numels[tensor]))
        assert elements  # no program is idle
        taken[tensor].extend(elements)
    assert taken == [list(range(numel)) for numel in numels]
    assert len(chunks) <= max_chunks + len(numels)


@pytest.mark.parametrize("numels", [[10**11], [10**11 // 300] * 300, [1] * 1000 + [10**11]])
def test_the_chunk_table_stays_small(numels: list[int]) -> None:
    chunks, size = chunk_table(numels, tile=1024, max_chunks=MAX_CHUNKS)
    assert len(chunks) <= MAX_CHUNKS + len(numels)
    assert chunks.numel() * chunks.itemsize < 2**20
    assert size < 2**31  # the kernels count a chunk's elements in 32 bits
    tensor, within = chunks[-1].tolist()
    assert 0 < numels[tensor] - within * size <= size
