"""Parameters and gradients on one memory: refused by name where a step would write what it reads or write it
twice, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.arguments import VARIANTS
from adamw_triton.memory.overlaps import Ranges, share_memory, span
from adamw_triton.step import stepped
from tests.amount import searched
from tests.optimizer.problems import bits, parameters, set_grads, state_bits

pytestmark = pytest.mark.bookkeeping


def touched(tensor: Tensor) -> set[int]:
    """The address of every byte."""
    starts = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, stride in enumerate(tensor.stride()):
        along = torch.arange(tensor.shape[dim]) * stride
        starts += along.view(-1, *[1] * (tensor.dim() - dim - 1))
    first = [tensor.data_ptr() + tensor.itemsize * index for index in starts.flatten().tolist()]
    return {address + byte for address in first for byte in range(tensor.itemsize)}


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
    sizes = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = [draw(st.integers(0, 9)) for _ in sizes]
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex64]))
    return dtype, tuple(sizes), tuple(strides), draw(st.integers(0, 12))


@searched("EXAMPLES", 200, 1, some=st.lists(views(), min_size=2, max_size=4))
def test_any_strided_views_beside_their_addresses(
    some: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]],
) -> None:
    memory = torch.zeros(1024, dtype=torch.uint8)
    tensors = [memory.view(dtype).as_strided(*view) for dtype, *view in some]
    addresses = list(map(touched, tensors))
    for a, byte_a in zip(tensors, addresses, strict=True):
        for b, byte_b in zip(tensors, addresses, strict=True):
            assert share_memory(a, b) == bool(byte_a & byte_b)
    starts, spans = [t.data_ptr() for t in tensors], list(map(span, tensors))
    reach = [set(range(s, s + n)) for s, n in zip(starts, spans, strict=True)]
    assert all(touched <= within for touched, within in zip(addresses, reach, strict=True))
    pairs = {(a, b) for b in range(len(some)) for a in range(b) if reach[a] & reach[b]}
    assert {tuple(sorted(pair)) for pair in Ranges(starts, spans).meeting} == pairs
    last = len(some) - 1
    other = torch.tensor([starts[last:], spans[last:]])
    met = Ranges(starts[:last], spans[:last]).met_by(*other)
    assert [bool(set().union(*reach[:last]) & reach[last])] == [bool(met)] or not spans[last]


def test_wild_strides_are_given_up_on_soon() -> None:
    memory = torch.zeros(3_000_000)
    assert share_memory(memory[::2], memory[1::3])
    assert share_memory(memory.as_strided((10**6,), (2,)), memory.as_strided((10**5, 2), (7, 11)))


APART: dict[str, Callable[[], list[Tensor]]] = {
    "neighbours in a flat tensor": lambda: list(torch.ones(60).split([10, 20, 30])),
    "columns of a matrix": lambda: list(torch.ones(9, 10).split([4, 5, 1], dim=1)),
    "every other element": lambda: [(base := torch.ones(11))[::2], base[1::2]],
    "a matrix and a column of it": lambda: [(base := torch.ones(9, 10))[:, :9], base[:, 9]],
    "real and imaginary parts": lambda: list(
        torch.view_as_real(torch.ones(9, dtype=torch.complex64)).unbind(-1)
    ),
    "tiles": lambda: [tile for rows in torch.ones(8, 8).split(4) for tile in rows.split(4, dim=1)],
    "two dtypes": lambda: [(base := torch.ones(20))[:10], base[10:].view(torch.bfloat16)],
    "empty ones": lambda: [(base := torch.ones(20)), base[5:5], base[7:7]],
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", APART)
def test_views_that_share_nothing_are_trained(kind: str, variant: str) -> None:
    params = [Parameter(view) for view in APART[kind]()]
    apart = [Parameter(view.clone()) for view in APART[kind]()]
    for members in (params, apart):
        optimizer = AdamW(members, variant=variant, lr=0.1)
        for step in range(2):
            set_grads(members, step)
            optimizer.step()
    assert bits(params) == bits(apart)


SHARED: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "all": lambda: ((base := torch.ones(6)), base),
    "all of a large one": lambda: ((base := torch.ones(140_000)), base),
    "the transposed": lambda: ((base := torch.ones(6, 6)), base.t()),
    "an end": lambda: ((base := torch.ones(60))[:40], base[39:]),
    "the inside": lambda: ((base := torch.ones(60)), base[30:31]),
    "another dtype": lambda: ((base := torch.ones(60)), base.view(torch.bfloat16)),
    "a column": lambda: ((base := torch.ones(9, 10))[:, :5], base[:, 4:]),
    "a row and a column": lambda: ((base := torch.ones(9, 10))[3], base[:, 3]),
    "the imaginary part": lambda: ((base := torch.ones(9, dtype=torch.complex64)), base.imag),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("later", [False, True])
def test_shared_memory_is_refused_by_both_names(kind: str, variant: str, later: bool) -> None:
    first, second = SHARED[kind]()
    a, middle, b = Parameter(first.clone() if later else first), Parameter(torch.ones(9)), Parameter(second)
    optimizer = AdamW([{"params": [a, middle]}, {"params": [b]}], variant=variant)
    if later:
        set_grads([a, middle, b], 0)
        optimizer.step()
        a.data = first
    for missing in (a, b):  # torch steps one of them, and so do we
        set_grads([a, middle, b], 1)
        missing.grad = None
        optimizer.step()
    set_grads([a, middle, b], 2)
    before = bits([a, middle, b]), state_bits(optimizer)
    with pytest.raises(
        ValueError, match=r"(0 of group 0|0 of group 1) and .*(0 of group 0|0 of group 1) share"
    ):
        optimizer.step()
    assert (bits([a, middle, b]), state_bits(optimizer)) == before
    b.data = second.clone()
    optimizer.step()
    assert float(optimizer.state[middle]["step"]) == 3 + later


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["twice from the start", "by hand", "in two groups by hand"])
def test_one_parameter_twice(how: str, variant: str) -> None:
    p, q = parameters(((5000,), (3,)))
    optimizer = AdamW([p, q, p] if how == "twice from the start" else [p, q], variant=variant)
    if how == "by hand":
        optimizer.param_groups[0]["params"].append(p)
    elif how == "in two groups by hand":
        optimizer.add_param_group({"params": []})
        optimizer.param_groups[1]["params"].append(p)
    set_grads([p, q], 1)
    before = bits([p, q])
    again = "0 of group 1" if "two" in how else "2 of group 0"
    with pytest.raises(ValueError, match=f"^parameter 0 of group 0 is parameter {again} too"):
        optimizer.step()
    assert bits([p, q]) == before
    optimizer.param_groups[-1]["params"].pop()
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1


GRADIENTS: dict[str, Callable[[Tensor], list[tuple[Tensor, Tensor]]]] = {
    "its own parameter": lambda base: [(base[:40], base[:40]), (base[50:], torch.ones(50))],
    "its own parameter, shifted": lambda base: [(base[:40], base[1:41]), (base[50:], torch.ones(50))],
    "every other element": lambda base: [(base[10:20], base[:19:2]), (base[50:], torch.ones(50))],
    "another parameter": lambda base: [(base[:40], torch.ones(40)), (torch.ones(30), base[5:35])],
    "the end of another one": lambda base: [(base[:40], torch.ones(40)), (torch.ones(30), base[39:69])],
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_on_parameters_memory_are_refused(kind: str, variant: str) -> None:
    pairs = GRADIENTS[kind](torch.ones(100))
    params = [Parameter(param) for param, _ in pairs]
    optimizer = AdamW(params, variant=variant)
    set_grads(params, 0)
    optimizer.step()
    for p, (_, grad) in zip(params, pairs, strict=True):
        p.grad = grad
    before = bits(params), state_bits(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter . of group 0 shares memory with .*gradient"):
            optimizer.step()
    assert (bits(params), state_bits(optimizer)) == before
    for p in params:
        p.grad = None if p.grad is None else p.grad.clone()
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_gradients_may_share_memory_with_each_other() -> None:
    params, apart = ([Parameter(torch.ones(30)) for _ in range(2)] for _ in range(2))
    both = torch.randn(30)
    for members, grads in ((params, (both, both)), (apart, (both.clone(), both.clone()))):
        for p, grad in zip(members, grads, strict=True):
            p.grad = grad
        AdamW(members).step()
    assert bits(params) == bits(apart)


def test_nothing_is_checked_again_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    with monkeypatch.context() as patch:
        for name in ("check_param", "check_grad", "Ranges", "span"):
            patch.setattr(stepped, name, None)
        for p in params:
            p.grad.neg_()
        optimizer.step()
        for p in params:
            p.grad = p.grad.clone()  # elsewhere: looked at, but as of the same kind
        optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 3
