"""Laws of the choice: it keeps every limit, more memory never makes it worse, its bytes are those taken."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.selection.plans import Candidate, Limits, Plan
from adamw_triton.selection.selector import PREFERENCES, Demand, Trained, select
from adamw_triton.state.formats import WEIGHTS
from adamw_triton.state.placement import SMALLEST_BUDGET
from tests.measuring import staging

MiB, GiB = 1 << 20, 1 << 30
BF16 = torch.bfloat16

numels = st.one_of(st.integers(0, 10**4), st.integers(0, 10**8), st.integers(0, 10**10))
tensors = st.builds(
    lambda numel, dtype, grad_itemsize, bits: Trained(numel, dtype, grad_itemsize, bits),
    numels,
    st.sampled_from([BF16, torch.float16, torch.float32]),
    st.sampled_from([2, 4]),
    st.sampled_from([None, None, None, 8, 32]),
) | st.builds(lambda numel: Trained(numel, BF16, 2, None, True), numels)
tensor_lists = st.lists(tensors, max_size=10)
memories = st.one_of(st.integers(-(10**9), 10**9), st.integers(0, 10**12))
preferences = st.sampled_from(list(PREFERENCES))


def limits(room: int, **arguments: Any) -> Limits:
    return Limits("a GPU", room, 1e12, 2e10, "made up", **arguments)


def plan(
    some: list[Trained], gpu: int, host: int, prefer: str = "speed", weights: tuple[str, ...] = ("nearest",)
) -> Plan:
    return select([Demand(limits(gpu), some)], host, prefer=prefer, weights=weights)


@given(tensor_lists, memories, memories, preferences)
def test_a_chosen_plan_keeps_every_limit(some: list[Trained], gpu: int, host: int, prefer: str) -> None:
    found = plan(some, gpu, host, prefer)
    for candidate in found.candidates:
        keeps = (candidate.gpu_bytes <= gpu or candidate.gpu_bytes == 0) and candidate.host_bytes <= max(
            host, 0
        )
        assert candidate.fits == (keeps and (candidate.host_bytes <= host))
    fitting = [candidate for candidate in found.candidates if candidate.fits]
    assert found.chosen is (fitting[0] if fitting else None)


def exactness(candidate: Candidate | None) -> int:
    return 0 if candidate is None else candidate.bits


@given(
    tensor_lists,
    st.integers(SMALLEST_BUDGET, 10**12),
    st.integers(0, 10**12),
    st.one_of(st.integers(0, 10**6), st.integers(0, 10**12)),
    st.one_of(st.integers(0, 10**6), st.integers(0, 10**12)),
    preferences,
)
@settings(max_examples=500)
def test_more_memory_never_yields_a_less_exact_or_slower_choice(
    some: list[Trained], gpu: int, host: int, more_gpu: int, more_host: int, prefer: str
) -> None:
    """Fewer bits are a step that moves less: so seconds are compared where the bits are the same."""
    less = plan(some, gpu, host, prefer).chosen
    more = plan(some, gpu + more_gpu, host + more_host, prefer).chosen
    assert exactness(more) >= exactness(less)
    if less is not None and more is not None and less.bits == more.bits:
        assert more.seconds <= less.seconds * 1.0001
    names = [way.name for way in PREFERENCES[prefer]]
    if less is not None:
        assert more is not None
        assert names.index(more.name) <= names.index(less.name)


@given(st.lists(st.tuples(tensor_lists, memories), min_size=1, max_size=3), memories)
def test_several_devices_go_one_way_and_each_keeps_its_limit(
    devices: list[tuple[list[Trained], int]], host: int
) -> None:
    demands = [Demand(limits(room), some) for some, room in devices]
    together = select(demands, host)
    alone = [select([demand], 10**15) for demand in demands]
    for index, candidate in enumerate(together.candidates):
        parts = [each.candidates[index] for each in alone]
        assert candidate.gpu_bytes == sum(part.gpu_bytes for part in parts)
        assert candidate.host_bytes == sum(part.host_bytes for part in parts)
        assert candidate.fits == (all(part.fits for part in parts) and candidate.host_bytes <= host)
        assert candidate.budgets == tuple(part.budgets[0] for part in parts)


# What is said is what is taken


@st.composite
def models(draw: st.DrawFn) -> list[int]:
    return draw(st.lists(st.one_of(st.integers(1, 6000), st.integers(1, 300_000)), min_size=1, max_size=6))


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(SMALLEST_BUDGET, 3 * MiB), st.sampled_from(sorted(WEIGHTS)))
def test_the_bytes_are_those_of_the_named_variant(numels: list[int], room: int, weights: str) -> None:
    for way in PREFERENCES["speed"]:
        check_bytes(numels, room, way.name, weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["32bit", "8bit, partly paged"])
def test_the_bytes_of_a_hundred_million_parameters(name: str) -> None:
    check_bytes([4 * 10**7, 4096, 3 * 10**7, 100, 3 * 10**7], 250 * MiB, name)


def check_bytes(numels: list[int], room: int, name: str, weights: str = "nearest") -> None:
    found = plan([Trained(numel, BF16, 2) for numel in numels], room, 10**15, weights=(weights,))
    for candidate in (each for each in found.candidates if each.name == name):
        params = [Parameter(torch.zeros(numel, dtype=torch.bfloat16)) for numel in numels]
        for param in params:
            param.grad = torch.zeros_like(param)
        budget = candidate.budgets[0] if candidate.paged else None
        transfer = "copy" if candidate.paged else "auto"
        optimizer = AdamW(
            params,
            variant=candidate.variant,
            memory_budget=budget,
            transfer=transfer,
            master_weights=weights == "exact",
            stochastic_rounding=weights == "stochastic",
        )
        optimizer.step()
        memory = optimizer.memory()
        paged = sum(buffer.nbytes for buffer in optimizer._store.buffers if buffer.paged)
        assert staging(optimizer) == candidate.staging_bytes
        assert memory.get("weights", 0) == candidate.weight_bytes
        assert paged == candidate.host_bytes
        assert memory["gpu"] + memory["host"] - paged + staging(optimizer) == candidate.gpu_bytes
        allocated = sum(a.nbytes for buffer in optimizer._store.buffers for a in buffer.arrays.values())
        assert allocated == memory["gpu"] + memory["host"]


# Estimates


def test_seconds_of_resident_and_of_paged_state() -> None:
    """1e9 bf16 parameters: 4 bytes read and written, 2 of gradients, state read and written."""
    found = plan([Trained(10**9, BF16, 2)], 10**11, 10**11)
    seconds = {candidate.name: candidate.seconds for candidate in found.candidates}
    assert seconds["32bit"] == pytest.approx(22e-3)
    assert seconds["8bit"] == pytest.approx(10.0625e-3)
    assert seconds["8bit, paged"] == pytest.approx(2.03125e9 / 2e10, rel=0.02)
    assert seconds["32bit, paged"] == pytest.approx(8e9 / 2e10, rel=0.02)


def test_tiny_pages_cost_more_than_large_ones() -> None:
    large = plan([Trained(10**9, BF16, 2)], 200 * MiB, 10**11).chosen
    tiny = plan([Trained(10**9, BF16, 2)], SMALLEST_BUDGET, 10**11).chosen
    assert large is not None
    assert tiny is not None
    assert tiny.seconds > 2 * large.seconds


# Refusals, and what a plan shows


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(ValueError, match="prefer: 'small'; it must be one of 'speed', 'exact'"):
        plan([Trained(10, BF16, 2)], GiB, GiB, "small")


@given(tensor_lists, memories, memories, preferences)
def test_a_plan_can_be_logged_and_shown(some: list[Trained], gpu: int, host: int, prefer: str) -> None:
    found = plan(some, gpu, host, prefer)
    logged = json.loads(json.dumps(found.to_dict()))
    assert logged["chosen"] == (None if found.chosen is None else found.chosen.name)
    assert len(logged["candidates"]) == 6
    text, page = str(found), found._repr_html_()
    for candidate in found.candidates:
        assert found.reason(candidate) in " ".join(text.split())
        assert candidate.name in page
    assert ("→" in text) == (found.chosen is not None)
    assert found.summary()
    assert "\n" not in found.summary()


def test_the_same_situation_gives_the_same_plan() -> None:
    some = [Trained(10**8, BF16, 2), Trained(10, torch.float32, 4)]
    assert plan(some, GiB, GiB) == plan(list(some), GiB, GiB)


def test_a_failed_candidate_is_passed_over() -> None:
    found = plan([Trained(10**7, BF16, 2)], GiB, GiB)
    assert found.chosen is found.candidates[0]
    after = found.without_chosen("broke")
    assert after.chosen is not None
    assert after.chosen.name == "8bit"
    assert after.reason(after.candidates[0]) == "broke"
    while after.chosen is not None:
        after = after.without_chosen("broke")
    assert after.summary().count("broke") == 6


@pytest.mark.parametrize(
    ("gpu", "host", "found"),
    [
        (GiB, GiB, "32bit, exact weights"),
        (100 * MiB, GiB, "8bit, exact weights"),
        (30 * MiB, GiB, "8bit, partly paged, exact weights"),
        (60 * MiB, 8 * MiB, "8bit, exact weights"),
        (50 * MiB, 0, "8bit, stochastic rounding"),
    ],
)
def test_weights_are_exact_wherever_their_bytes_fit(gpu: int, host: int, found: str) -> None:
    some = [Trained(10**7, BF16, 2), Trained(10**7, torch.float32, 4)]
    chosen = plan(some, gpu, host, weights=("exact", "stochastic")).chosen
    assert chosen is not None
    assert chosen.label == found


def test_only_weights_of_16_bits_have_a_choice() -> None:
    found = plan([Trained(10**7, torch.float32, 4)], GiB, GiB, weights=("exact", "stochastic"))
    assert [(c.label, c.weight_bytes) for c in found.candidates] == [(c.name, 0) for c in found.candidates]


@given(tensor_lists, memories)
def test_memory_that_is_the_hosts_is_not_paged(some: list[Trained], host: int) -> None:
    found = select([Demand(limits(0, shared=True), some)], host)
    assert not any(candidate.fits for candidate in found.candidates if candidate.paged)
    assert all(candidate.gpu_bytes == 0 for candidate in found.candidates)
    assume(found.chosen is not None)
    assert found.chosen is not None
    assert found.chosen.host_bytes <= host
