"""The walk over a call's tensors: every element once, and the bits do not tell who was updated with whom."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton_kernels import Hyper, Layout, fusion, hyper_table, reference
from adamw_triton_kernels.runs import runs

NUMELS = (0, 1, 127, 128, 129, 128 * 3, 128 * 40, 5000, 256 * 30, 0, 256, 128 * 128, 300_000, 512, 1024, 256)
FIRSTS = (0, 7, 0, 1 << 33, 0, 256, 0, 0, 1 << 31, 0, 0, 0, 0, 2**32 - 128, 0, 512)
ROWS = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1)
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
FORMATS = [Float32(), Float32(amsgrad=True), Blockwise8(128), Blockwise8(256)]

pytestmark = pytest.mark.usefixtures("counter")


@dataclass
class Problem:
    """Tensors with their state in one buffer; two rows of hyperparameters."""

    format: Format
    params: list[Tensor]
    arrays: dict[str, Tensor]
    layout: Layout

    @classmethod
    def of(cls, state_format: Format, dtype: torch.dtype) -> Problem:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(n, generator=generator).to(dtype) for n in NUMELS]
        slots = make_slots(state_format, [(p, "p") for p in params], torch.device("cpu"))
        layout = Layout(NUMELS, tuple(slot.start for slot in slots), FIRSTS, ROWS)
        return cls(state_format, params, slots[0].buffer.arrays, layout)

    def step(self, number: int, dtype: torch.dtype, *, alone: bool) -> None:
        """``alone``: with a call for each tensor, so that none can meet another."""
        update = getattr(reference, self.format.update)
        hypers, grads = hypers_at(number), gradients(number, dtype)
        if not alone:
            update(self.params, grads, self.arrays, self.layout, hyper_table(hypers))
            return
        layout = self.layout
        places = zip(layout.numels, layout.offsets, layout.firsts, layout.rows, strict=True)
        for p, g, (numel, offset, first, row) in zip(self.params, grads, places, strict=True):
            update(
                [p], [g], self.arrays, Layout((numel,), (offset,), (first,), (0,)), hyper_table([hypers[row]])
            )

    def bits(self) -> list[Tensor]:
        return [t.view(torch.uint8) for t in (*self.params, *self.arrays.values())]


def hypers_at(step: int) -> list[Hyper]:
    return [
        Hyper.at(step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, grad_scale=-0.5),
        Hyper.at(step + 5, lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ]


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    """With zeros, a dead block, NaN, infinity, and one whose square overflows."""
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(n, generator=generator) * 1e-3 for n in NUMELS]
    grads[6][:200] = 0.0
    grads[6][300], grads[8][7], grads[12][11], grads[14][5] = float("nan"), float("inf"), 6e4, float("nan")
    if dtype != HALF:
        grads[12][299_999] = 1e30
    return [grad.to(dtype) for grad in grads]


def _check(state_format: Format, dtype: torch.dtype, grad_dtype: torch.dtype, patience: int) -> None:
    alone, together = Problem.of(state_format, dtype), Problem.of(state_format, dtype)
    for number in (1, 2, 3):
        fusion.PATIENCE = 1 << 60
        alone.step(number, grad_dtype, alone=True)
        fusion.PATIENCE = patience
        together.step(number, grad_dtype, alone=False)
        assert all(map(torch.equal, alone.bits(), together.bits())), number
    assert not fusion._Work.refused


@pytest.mark.parametrize("grad_dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("state_format", FORMATS, ids=str)
def test_tensors_together_get_the_bits_that_each_gets_alone(
    state_format: Format, dtype: torch.dtype, grad_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "PATIENCE", 1 << 60)
    _check(state_format, dtype, grad_dtype, patience=1 << 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (BFLOAT, FLOAT), (FLOAT, BFLOAT)],
)
@pytest.mark.parametrize("state_format", FORMATS, ids=str)
def test_and_compiled_too(
    state_format: Format, dtype: torch.dtype, grad_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph a function serves all sizes, one of as many blocks as a block has elements among them."""
    made = []
    graph = fusion._Graph
    monkeypatch.setattr(fusion, "_Graph", lambda f, tensors: made.append(f) or graph(f, tensors))
    monkeypatch.setattr(fusion, "PATIENCE", 1 << 60)
    _check(state_format, dtype, grad_dtype, patience=0)
    assert len(made) == len(set(made))


@pytest.mark.parametrize("state_format", FORMATS, ids=str)
def test_memory_order_counts_and_leaves_that_require_gradients_are_written_to(state_format: Format) -> None:
    torch.manual_seed(0)
    flat = [torch.randn(n) for n in (512, 4096, 256)]
    shaped = [
        flat[0].clone().as_strided((2, 16, 4, 4), (256, 1, 64, 16)).requires_grad_(),  # channels last
        flat[1].clone().view(64, 64).t().requires_grad_(),
        flat[2].clone().requires_grad_(),
    ]
    slots = make_slots(state_format, [(p, "p") for p in flat], torch.device("cpu"))
    layout = Layout((512, 4096, 256), tuple(slot.start for slot in slots), (0, 0, 0), (0, 0, 0))
    assert [len(run.spans) for run in runs(flat, flat, layout, 1 << 20, 1 << 20)] == [3]
    grads = [torch.randn_like(p) for p in flat]
    shaped_grads = [g.as_strided(p.shape, p.stride()) for g, p in zip(grads, shaped, strict=True)]
    for params, given_grads in ((flat, grads), (shaped, shaped_grads)):
        arrays = {name: torch.zeros_like(array) for name, array in slots[0].buffer.arrays.items()}
        getattr(reference, state_format.update)(
            params, given_grads, arrays, layout, hyper_table(hypers_at(1))
        )
    for p, q in zip(flat, shaped, strict=True):
        assert torch.equal(p, q.detach().as_strided(p.shape, (1,)))


@given(
    tensors=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from([0, 0, 0, 3]), st.sampled_from([0, 0, 0, 1])),
        max_size=12,
    ),
    longest=st.integers(1, 80),
    gathered=st.integers(1, 200),
)
def test_every_element_is_in_one_run_with_its_own_state(
    tensors: list[tuple[int, int, int]], longest: int, gathered: int
) -> None:
    """Tensors as (elements, gap before its state, row); each element's number is where its state is."""
    offsets, end = [], 0
    for numel, gap, _ in tensors:
        offsets.append(end + gap)
        end += gap + numel
    layout = Layout(
        tuple(numel for numel, _, _ in tensors),
        tuple(offsets),
        tuple(1000 * index for index in range(len(tensors))),
        tuple(row for _, _, row in tensors),
    )
    params = [torch.arange(offset, offset + n) for n, offset in zip(layout.numels, offsets, strict=True)]
    grads = [-p for p in params]
    seen: list[int] = []
    for run in runs(params, grads, layout, longest, gathered):
        numel = run.at.stop - run.at.start
        assert (
            numel == sum(span.numel for span in run.spans) <= (longest if len(run.spans) == 1 else gathered)
        )
        assert run.param.tolist() == [-g for g in run.grad.tolist()] == list(range(run.at.start, run.at.stop))
        seen += run.param.tolist()
        at = run.at.start
        for span in run.spans:
            index = span.first // 1000
            assert layout.rows[index] == run.row
            if span.numel:
                assert at == offsets[index] + span.first % 1000
            at += span.numel
        run.param.add_(5000)
    assert seen == [offset + i for n, offset in zip(layout.numels, offsets, strict=True) for i in range(n)]
    assert all(p.tolist() == [5000 - g for g in grad.tolist()] for p, grad in zip(params, grads, strict=True))


class Temporaries(TorchDispatchMode):
    """Counts the bytes of memory that is made while it is entered, and kept."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for made in tree_leaves(outputs):
            memory = made.untyped_storage() if isinstance(made, Tensor) else None
            if memory is not None and memory._cdata not in self._known:
                self._known.add(memory._cdata)
                self._now += memory.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(made, self._gone, memory._cdata, memory.nbytes())
        return outputs

    def _gone(self, memory: int, size: int) -> None:
        self._known.remove(memory)
        self._now -= size


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("state_format", FORMATS, ids=str)
def test_before_anything_is_written_there_was_room_for_all_temporaries(
    state_format: Format, dtype: torch.dtype
) -> None:
    problem = Problem.of(state_format, dtype)
    grads, hyper = gradients(1, dtype), hyper_table(hypers_at(1))
    arguments = (problem.params, grads, problem.arrays, problem.layout, hyper)
    prepare = getattr(reference, state_format.update).prepare
    with Temporaries([*problem.params, *grads, *problem.arrays.values(), hyper]) as preparing:
        call = prepare(*arguments)
    with Temporaries([*problem.params, *grads, *problem.arrays.values(), hyper]) as updating:
        call(problem.arrays)
    assert 0 < updating.most <= preparing.most
