"""What state takes and where it goes: laws of the sizes, and that the optimizer allocates just that."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.paging.pager import carve
from adamw_triton.state import placement
from adamw_triton.state.buffers import Page, StateBuffer
from adamw_triton.state.formats import Blockwise8, Float32, Format, nbytes
from adamw_triton.state.placement import (
    GRAIN,
    PAGE_BYTES,
    SMALLEST_BUDGET,
    SMALLEST_PAGE,
    Placement,
    Ring,
    check_budget,
    page_elements,
    place,
    ring_for,
    staged_bytes,
)
from tests.measuring import staging

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
FORMATS: tuple[Format, ...] = (Float32(), Float32(amsgrad=True), Blockwise8(128), Blockwise8(256))

Sizes = list[tuple[Format, int]]

formats = st.sampled_from(FORMATS)
numels = st.one_of(st.integers(0, 5000), st.integers(0, 10**7), st.integers(0, 10**11))
size_lists: st.SearchStrategy[Sizes] = st.lists(st.tuples(formats, numels), max_size=12)
page_sizes = st.one_of(st.integers(0, 100_000), st.integers(0, 2 * PAGE_BYTES))


def total(sizes: Sizes) -> int:
    return sum(nbytes(*size) for size in sizes)


@st.composite
def budgeted(draw: st.DrawFn) -> tuple[Sizes, int]:
    """Sizes of one order of magnitude, and a budget: for little more than a ring, for some part of them
    beside it, or to the byte for a few of them."""
    largest = 10 ** draw(st.integers(3, 11))
    sizes = draw(st.lists(st.tuples(formats, st.integers(0, largest)), max_size=12))
    some = [size for size in sizes if draw(st.booleans())]
    part = draw(st.one_of(st.just(total(some)), st.integers(0, total(sizes))))
    return sizes, draw(
        st.one_of(st.integers(SMALLEST_BUDGET, 3 * PAGE_BYTES), st.just(3 * PAGE_BYTES + part))
    )


# Sharing out


@given(budgeted())
def test_a_budget_is_kept(case: tuple[Sizes, int]) -> None:
    sizes, budget = case
    assert place(sizes, True, budget).gpu_bytes <= budget


@given(budgeted(), st.booleans())
def test_every_parameter_is_either_resident_or_paged(case: tuple[Sizes, int], without: bool) -> None:
    sizes, budget = case
    placed = place(sizes, True, None if without else budget)
    needs = [nbytes(*size) for size in sizes]
    assert len(placed.paged) == len(sizes)
    assert placed.host_bytes == sum(n for n, paged in zip(needs, placed.paged, strict=True) if paged)
    assert placed.resident_bytes == sum(n for n, paged in zip(needs, placed.paged, strict=True) if not paged)
    assert placed.resident_bytes + placed.host_bytes == total(sizes)
    assert not any(paged for n, paged in zip(needs, placed.paged, strict=True) if n == 0)


@given(budgeted())
def test_what_is_paged_would_not_have_fitted_in_its_turn(case: tuple[Sizes, int]) -> None:
    """In the order of the parameters, beside a whole ring."""
    sizes, budget = case
    placed = place(sizes, True, budget)
    resident = 0
    for size, paged in zip(sizes, placed.paged, strict=True):
        fits = resident + nbytes(*size) + 3 * placed.page_bytes <= budget
        assert paged == (not fits and placed.host_bytes > 0)
        resident += 0 if paged else nbytes(*size)


@given(budgeted(), st.one_of(st.integers(1, 1000), st.integers(1, 100 * GiB)))
def test_a_larger_budget_never_pages_more(case: tuple[Sizes, int], more: int) -> None:
    """Where two budgets first differ, the larger one takes in what goes beyond all of the smaller one."""
    sizes, budget = case
    assert place(sizes, True, budget + more).host_bytes <= place(sizes, True, budget).host_bytes


@given(size_lists)
def test_all_is_resident_where_nothing_is_paged_or_all_fits(sizes: Sizes) -> None:
    for placed in (place(sizes, False), place(sizes, True, total(sizes))):
        assert placed.paged == (False,) * len(sizes)
        assert (placed.resident_bytes, placed.host_bytes) == (total(sizes), 0)
        assert placed.ring.nbytes == 0
        assert placed.gpu_bytes == total(sizes)


@given(size_lists)
def test_without_a_budget_the_gpu_holds_the_ring_alone(sizes: Sizes) -> None:
    placed = place(sizes, True)
    assert placed.host_bytes == total(sizes)
    assert placed.gpu_bytes == placed.ring.nbytes <= 3 * 64 * MiB


def test_one_byte_less_than_all_pages_something() -> None:
    sizes: Sizes = [(Float32(), 10**8), (Blockwise8(), 10**8)]
    assert not any(place(sizes, True, total(sizes)).paged)
    assert place(sizes, True, total(sizes) - 1).paged == (False, True)


# Pages


@given(formats, page_sizes)
def test_a_page_never_takes_more_than_it_may(state_format: Format, page_bytes: int) -> None:
    """Unless it is one block."""
    elements = page_elements(state_format, page_bytes)
    assert elements > 0
    assert staged_bytes(state_format, elements) <= page_bytes or elements == state_format.alignment


@given(formats, page_sizes)
def test_pages_begin_where_blocks_and_vectors_do(state_format: Format, page_bytes: int) -> None:
    """From ``GRAIN`` elements on every array of every page begins at a multiple of 16 bytes."""
    elements = page_elements(state_format, page_bytes)
    assert elements % state_format.alignment == 0
    if elements >= GRAIN:
        assert elements % GRAIN == 0
        for number in range(5):
            for array in state_format.arrays:
                assert number * elements // array.per * array.dtype.itemsize % 16 == 0


@given(formats, page_sizes)
def test_pages_are_as_long_as_they_may_be(state_format: Format, page_bytes: int) -> None:
    """One step more could take more than there is, with each array's beginning rounded up."""
    elements = page_elements(state_format, page_bytes)
    longer = elements + (GRAIN if elements >= GRAIN else state_format.alignment)
    assert nbytes(state_format, longer) + 256 * len(state_format.arrays) > page_bytes


@pytest.mark.parametrize("state_format", FORMATS, ids=repr)
def test_the_smallest_pages_are_grains(state_format: Format) -> None:
    """So the exception for smaller ones concerns no budget that is allowed."""
    assert page_elements(state_format, SMALLEST_PAGE) >= GRAIN


@settings(deadline=None)
@given(formats, st.integers(1, 300))
def test_what_a_page_is_said_to_take_is_what_is_carved(state_format: Format, blocks: int) -> None:
    """Each array begins at a multiple of 256 bytes, behind the one before it, and the last one fits."""
    elements = blocks * state_format.alignment
    buffer = StateBuffer(state_format, torch.device("cpu"), elements, 1)
    stage = torch.empty(staged_bytes(state_format, elements), dtype=torch.uint8)
    arrays = Page(buffer, 0, elements).arrays()
    end = 0
    for name, staged in carve(stage, arrays).items():
        start = staged.data_ptr() - stage.data_ptr()
        assert staged.shape == arrays[name].shape
        assert start % 256 == 0
        assert end <= start < end + 256
        end = start + staged.nbytes
    assert end <= len(stage) < end + 256


# The ring


@given(
    st.lists(
        st.tuples(formats, st.integers(1, 400)).map(lambda pair: (pair[0], pair[0].alignment * pair[1])),
        max_size=5,
    ),
    st.integers(0, 100_000),
)
@example([(Float32(), 32)], 0)
def test_the_ring_holds_the_largest_pages_that_there_are(buffers: Sizes, page_bytes: int) -> None:
    """Counted page by page; with fewer than three pages there are fewer stages."""
    pages = []
    for state_format, numel in buffers:
        elements = page_elements(state_format, page_bytes)
        pages += [
            staged_bytes(state_format, min(start + elements, numel) - start)
            for start in range(0, numel, elements)
        ]
    ring = ring_for(buffers, page_bytes)
    assert ring == Ring(max(pages, default=0), min(3, len(pages)))
    assert ring.nbytes == ring.stage_bytes * ring.stages


# The optimizer allocates what was said


@st.composite
def trainings(draw: st.DrawFn) -> tuple[list[int], str, int | None, int]:
    """Parameters of up to a million elements in all, a variant, a budget, and the pages' size."""
    count = draw(st.integers(1, 8))
    largest = 10**6 // count
    kinds = st.one_of(st.integers(0, min(5000, largest)), st.integers(0, largest))
    sizes = draw(st.lists(kinds, min_size=count, max_size=count))
    budget = draw(st.none() | st.integers(SMALLEST_BUDGET, 9 * sum(sizes) + SMALLEST_BUDGET))
    page_bytes = draw(st.sampled_from([PAGE_BYTES, SMALLEST_PAGE, 100_000]))
    return sizes, draw(st.sampled_from(["paged_8bit", "paged_32bit"])), budget, page_bytes


@settings(max_examples=60, deadline=None)
@given(trainings())
@example(([300_000, 10, 5000, 200_000, 0], "paged_8bit", 700_000, SMALLEST_PAGE))
@example(([100_000, 10, 5000, 50_000, 0], "paged_32bit", 700_000, SMALLEST_PAGE))
def test_the_optimizer_takes_what_the_placement_says(case: tuple[list[int], str, int | None, int]) -> None:
    """To the byte, in all places and formats. (The CPU's own state counts as the host's.)"""
    numels, variant, budget, page_bytes = case
    params = [Parameter(torch.zeros(numel)) for numel in numels]
    for param in params:
        param.grad = torch.zeros_like(param)
    sizes = [(format_of(variant, numel), numel) for numel in numels]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "PAGE_BYTES", page_bytes)
        placed = place(sizes, True, budget)
        optimizer = AdamW(params, variant=variant, memory_budget=budget, transfer="copy")
        optimizer.step()
    memory = optimizer.memory()
    assert memory["gpu"] + memory["host"] == placed.resident_bytes + placed.host_bytes
    assert staging(optimizer) == placed.ring.nbytes
    for name in ("8bit", "32bit"):
        assert memory.get(name, 0) == total([size for size in sizes if size[0].name == name])
    buffers = [optimizer._store.slots[id(param)].buffer for param in params]
    assert tuple(buffer.paged for buffer in buffers) == placed.paged
    assert sum(buffer.nbytes for buffer in {*buffers} if buffer.paged) == placed.host_bytes
    for buffer in buffers:
        assert buffer.nbytes == sum(array.nbytes for array in buffer.arrays.values())


def format_of(variant: str, numel: int) -> Format:
    return Blockwise8() if variant == "paged_8bit" and numel >= 4096 else Float32()


# Models that this machine cannot hold


def llama(hidden: int, layers: int, vocabulary: int, feed_forward: int, key_value: int) -> list[int]:
    """The sizes of a language model's tensors, in the order of its parameters."""
    layer = [hidden * hidden, key_value * hidden, key_value * hidden, hidden * hidden]
    layer += [feed_forward * hidden] * 3 + [hidden] * 2
    return [vocabulary * hidden, *layer * layers, hidden, vocabulary * hidden]


MODELS = {
    "1e6": llama(128, 4, 512, 352, 64),
    "1e7": llama(256, 6, 8000, 704, 256),
    "1e8": llama(768, 12, 8000, 2048, 768),
    "1e9": llama(2048, 16, 32000, 5632, 512),
    "1e10": llama(4096, 42, 64000, 14336, 1024),
    "1e11": llama(10240, 86, 128000, 28672, 1280),
}
BYTES_PER_ELEMENT = {"paged_32bit": 8.0, "paged_8bit": 2 + 4 / 128}


def placed_model(model: str, variant: str, budget: int | None) -> Placement:
    return place([(format_of(variant, numel), numel) for numel in MODELS[model]], True, budget)


@pytest.mark.parametrize("model", MODELS)
def test_the_models_are_as_large_as_they_are_called(model: str) -> None:
    assert sum(MODELS[model]) == pytest.approx(float(model), rel=0.25)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", BYTES_PER_ELEMENT)
@pytest.mark.parametrize("budget", [None, SMALLEST_BUDGET, 10 * MiB, 200 * MiB, GiB, 20 * GiB])
def test_the_gpus_share_is_bounded_whatever_the_model(model: str, variant: str, budget: int | None) -> None:
    """By the budget, and without one by three pages."""
    placed = placed_model(model, variant, budget)
    assert placed.gpu_bytes <= (3 * 64 * MiB if budget is None else budget)
    assert placed.ring.nbytes <= 3 * 64 * MiB
    assert placed.ring.stages <= 3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", BYTES_PER_ELEMENT)
def test_the_host_holds_the_state_and_hardly_more(model: str, variant: str) -> None:
    """Within 1%; tensors of under 4,096 elements have 32-bit state."""
    placed = placed_model(model, variant, None)
    exact = sum(numel * (BYTES_PER_ELEMENT[variant] if numel >= 4096 else 8) for numel in MODELS[model])
    assert exact <= placed.host_bytes <= 1.01 * exact
    assert placed.resident_bytes == 0


def test_tensors_of_odd_sizes_waste_less_than_a_block_each() -> None:
    for state_format in FORMATS:
        block = nbytes(state_format, 1)
        for numel in (1, 4097, 10**6 + 1):
            exact = numel * block / state_format.alignment
            placed = place([(state_format, numel)] * 7, True)
            assert 7 * exact <= placed.host_bytes < 7 * (exact + block)


# Budgets that are refused


@pytest.mark.parametrize(
    ("budget", "text"), [(0, "0 B"), (10 * KiB, "10.0 KiB"), (192 * KiB - 1, "192.0 KiB")]
)
def test_a_budget_that_no_ring_fits_is_refused_with_the_numbers(budget: int, text: str) -> None:
    message = (
        f"memory_budget of {text} is too small: paging needs a ring of 3 pages of at least 64.0 KiB, "
        "192.0 KiB in all"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_budget(budget)


@pytest.mark.parametrize("budget", [192 * KiB, 192 * KiB + 1, 1 << 50])
def test_every_other_budget_is_allowed(budget: int) -> None:
    check_budget(budget)


@pytest.mark.parametrize("state_format", FORMATS, ids=repr)
def test_the_smallest_budget_is_enough_for_anything(state_format: Format) -> None:
    placed = place([(state_format, 10**11), (state_format, 1)], True, 192 * KiB)
    assert placed.gpu_bytes <= 192 * KiB
    assert placed.ring.stages == 3
