"""The compiled update of CPU tensors gives the bits of the plain one, and the plain one stands in for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton_kernels import Hyper, Layout, fusion, hyper_table, reference

NUMELS = (100_001, 5000, 7, 128 * 40)


@pytest.fixture(autouse=True)
def counter() -> Iterator[None]:
    """Each test's own; the module's is put back."""
    before = vars(fusion._Work).copy()
    fusion._Work.done, fusion._Work.refused = 0, False
    yield
    fusion._Work.done, fusion._Work.refused = before["done"], before["refused"]


class Problem:
    def __init__(self, state_format: Format, dtype: torch.dtype, *, shared: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.generator, self.format = generator, state_format
        self.params = [torch.randn(n, generator=generator).to(dtype) for n in NUMELS]
        slots = make_slots(state_format, [(p, "p") for p in self.params], torch.device("cpu"))
        self.layout = Layout(NUMELS, tuple(s.start for s in slots), (0, 7, 0, 1 << 33), (0,) * len(NUMELS))
        self.arrays = slots[0].buffer.arrays
        if shared:  # as a page's are, in a staging buffer
            sizes = [-(-array.nbytes // 256) * 256 for array in self.arrays.values()]
            parts = torch.zeros(sum(sizes), dtype=torch.uint8).split(sizes)
            self.arrays = {
                name: part[: array.nbytes].view(array.dtype)
                for (name, array), part in zip(self.arrays.items(), parts, strict=True)
            }

    def step(self, number: int) -> None:
        grads = [torch.randn(n, generator=self.generator) * 1e-3 for n in NUMELS]
        grads[0][10], grads[0][3000] = 1e30, 0.0  # its square overflows
        hyper = hyper_table(
            [Hyper.at(number, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, grad_scale=-0.5)]
        )
        update = getattr(reference, self.format.update)
        update(
            self.params,
            [g.to(self.params[0].dtype) for g in grads],
            self.arrays,
            self.layout,
            hyper,
        )

    def bits(self) -> list[Tensor]:
        return [t.view(torch.uint8) for t in (*self.params, *self.arrays.values())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state_format", "dtype", "shared"),
    [
        (Float32(), torch.float32, False),
        (Float32(amsgrad=True), torch.bfloat16, True),
        (Blockwise8(128), torch.float32, True),
        (Blockwise8(256), torch.bfloat16, False),
    ],
    ids=str,
)
def test_compiled_gives_the_same_bits(
    state_format: Format, dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = (Problem(state_format, dtype, shared=shared) for _ in range(2))
    calls = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: calls.append(f) or real(f, **how))
    for number in (1, 2, 3):
        monkeypatch.setattr(fusion, "PATIENCE", 1 << 60)
        plain.step(number)
        monkeypatch.setattr(fusion, "PATIENCE", 0)
        compiled.step(number)
        assert all(map(torch.equal, plain.bits(), compiled.bits())), number
    assert not fusion._Work.refused


def test_nothing_is_compiled_before_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: object, **how: object) -> object:
        compiled.append(function)
        return function

    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(fusion, "PATIENCE", 10_000)
    double = fusion.fused(lambda x: x * 2)
    for done in range(0, 10_000, 5000):
        assert not compiled, done
        double(torch.ones(5000))
    double(torch.ones(fusion.SMALL - 1))
    assert not compiled
    for _ in range(2):
        assert double(torch.ones(5000)).sum() == 10_000
    assert len(compiled) == 1


def test_a_machine_without_a_compiler_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile(function: object, **how: object) -> object:
        def fail(*tensors: Tensor) -> None:
            raise RuntimeError("no C++ compiler\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(fusion, "PATIENCE", 0)
    double = fusion.fused(lambda x: x * 2)
    with caplog.at_level(logging.WARNING, "adamw_triton"):
        for _ in range(2):
            assert double(torch.ones(5000)).sum() == 10_000
    assert [record.message for record in caplog.records] == [
        "torch.compile failed: AdamW on CPU tensors runs several times slower. no C++ compiler"
    ]
