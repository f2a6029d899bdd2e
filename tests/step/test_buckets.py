"""Which parameters are stepped together, in whatever order their gradients come."""

from __future__ import annotations

import itertools
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamw_triton.step.buckets import Buckets

LIMIT = 1000
sizes = st.lists(st.integers(1, 3 * LIMIT), min_size=1, max_size=40)


def params_of(nbytes: list[int]) -> list[Tensor]:
    return [torch.empty(n, dtype=torch.uint8) for n in nbytes]


def one_step(buckets: Buckets, order: list[Tensor]) -> tuple[list[list[int]], int]:
    """The buckets that were stepped during it and at its end, and how many bytes waited at most."""
    stepped, waiting, most = [], 0, 0
    for param in order:
        waiting += param.nbytes
        most = max(most, waiting)
        for bucket in buckets.arrived(param):
            stepped.append(sorted(map(id, bucket)))
            waiting -= sum(each.nbytes for each in bucket)
    stepped += [sorted(map(id, bucket)) for bucket in buckets.rest()]
    return stepped, most


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(0, 1 << 30))
def test_each_is_stepped_once_and_few_bytes_wait(nbytes: list[int], seed: int) -> None:
    """Whatever arrives, in any order, in any step."""
    choose, buckets, params = random.Random(seed), Buckets(LIMIT), params_of(nbytes)
    for _ in range(4):
        order = choose.sample(params, choose.randint(1, len(params)))
        stepped, most = one_step(buckets, order)
        assert sorted(itertools.chain.from_iterable(stepped)) == sorted(map(id, order))
        assert most <= 2 * LIMIT + max(nbytes)


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_the_same_order_makes_the_same_buckets(nbytes: list[int]) -> None:
    """In the first step what comes last only knows at its end that it does; afterwards nothing is left."""
    buckets, params = Buckets(LIMIT), params_of(nbytes)
    first, _ = one_step(buckets, params)
    for bucket, last in zip(first, [*[False] * (len(first) - 1), True], strict=True):
        assert last or sum(p.nbytes for p in params if id(p) in bucket) >= LIMIT
    for _ in range(3):
        assert one_step(buckets, params)[0] == first
        for param in params:
            buckets.arrived(param)
        assert buckets.rest() == []


def test_a_bucket_keeps_its_members_though_their_order_changes() -> None:
    buckets, params = Buckets(LIMIT), params_of([500] * 8)
    first, _ = one_step(buckets, params)
    swapped = [params[i] for i in (1, 0, 2, 4, 3, 5, 7, 6)]
    assert sorted(one_step(buckets, swapped)[0]) == sorted(first)


def test_what_never_came_is_learnt_when_it_comes() -> None:
    buckets, params = Buckets(LIMIT), params_of([400] * 6)
    one_step(buckets, params[:5])
    late, _ = one_step(buckets, params)
    assert [id(params[5])] in late


def test_devices_have_buckets_of_their_own() -> None:
    """Their threads' arrivals interleave as they like."""
    buckets = Buckets(LIMIT)
    params = [torch.empty(400, dtype=torch.uint8, device=d) for d in ("cpu", "meta") * 6]
    assert all(len({p.device for p in bucket}) == 1 for p in params for bucket in buckets.arrived(p))


def test_gradients_of_two_streams_are_in_no_bucket_together() -> None:
    """On one stream it is not known whether those of the other are there yet."""
    params = [torch.empty(100) for _ in range(4)]
    buckets = Buckets(800)
    found = [buckets.arrived(param, stream) for param, stream in zip(params, (1, 2, 1, 2), strict=True)]
    assert [[[id(each) for each in bucket] for bucket in some] for some in found] == [
        [], [], [[id(params[0]), id(params[2])]], [[id(params[1]), id(params[3])]],
    ]  # fmt: skip
