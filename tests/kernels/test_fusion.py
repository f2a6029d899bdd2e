"""The compiled update of CPU tensors gives the bits of the plain one, and the plain one stands in for it."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo
import torch._inductor
from torch import Tensor

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton_kernels import Hyper, Layout, codes, fusion, hyper_table, reference

NUMELS = (100_001, 5000, 7, 128 * 40)

pytestmark = pytest.mark.usefixtures("counter")


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
            self.format.weights,
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
        (Float32(weights="stochastic"), torch.bfloat16, True),
        (Float32(weights="remainder"), torch.bfloat16, False),
        (Float32(weights="master"), torch.float16, False),
        (Blockwise8(128, "stochastic"), torch.bfloat16, False),
        (Blockwise8(128, "remainder"), torch.bfloat16, True),
        (Blockwise8(256, "master"), torch.float16, False),
    ],
    ids=str,
)
def test_compiled_gives_the_same_bits(
    state_format: Format, dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = (Problem(state_format, dtype, shared=shared) for _ in range(2))
    for number in (1, 2, 3):
        monkeypatch.setattr(fusion, "PATIENCE", 1 << 60)
        plain.step(number)
        monkeypatch.setattr(fusion, "PATIENCE", 0)
        compiled.step(number)
        assert all(map(torch.equal, plain.bits(), compiled.bits())), number
    assert not fusion._Work.refused


class Graph:
    """In place of a compiled one: counts how often it is made and called. It fits an even number of rows."""

    made: ClassVar[list[Graph]] = []

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        self.function, self.calls = function, 0
        self.made.append(self)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors[0]) % 2 == 0

    def __call__(self, *tensors: Tensor) -> Any:
        self.calls += 1
        return self.function(*tensors)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(fusion, "_Graph", Graph)
    return Graph.made


def test_nothing_is_compiled_before_it_pays(made: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "PATIENCE", 10_000)
    double = fusion.fused(lambda x: x * 2)
    for done in range(0, 10_000, 5000):
        assert not made, done
        double(torch.ones(5000))
    double(torch.ones(fusion.SMALL - 1))
    assert not made
    for _ in range(2):
        assert double(torch.ones(5000)).sum() == 10_000
    assert [graph.calls for graph in made] == [2]


def test_a_graph_serves_the_dtypes_shapes_and_threads_that_it_fits(
    made: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "PATIENCE", 0)
    double = fusion.fused(lambda x: x * 2)
    for size in (5000, 6000, 5000):
        double(torch.ones(size))
    assert [graph.calls for graph in made] == [3]
    double(torch.ones(5001))  # it does not fit
    double(torch.ones(5000, dtype=torch.bfloat16))
    assert [graph.calls for graph in made] == [3, 1, 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        double(torch.ones(5000))
    finally:
        torch.set_num_threads(threads)
    assert [graph.calls for graph in made] == [3, 1, 1, 1]


def test_code_is_made_for_long_tensors_whichever_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a short one the compiler makes a loop for one thread, and long ones would get it too."""
    lengths = []

    def compile(graph: object, examples: Sequence[Any]) -> Callable[..., Tensor]:
        lengths.append([example.shape[0].node.hint for example in examples])
        return lambda x, numbers: x * numbers[0]

    monkeypatch.setattr("torch._inductor.compile", compile)
    monkeypatch.setattr(fusion, "PATIENCE", 0)
    fusion.fused(lambda x, numbers: x * numbers[0])(torch.ones(50), torch.ones(7))
    assert lengths == [[fusion.LARGE + 1, 7]]


@pytest.mark.slow
def test_what_a_graph_takes_for_granted_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shapes, and whichever came first."""
    monkeypatch.setattr(fusion, "PATIENCE", 0)
    combine = fusion.fused(lambda x, y: (x * y).sum(-1))
    x, y = torch.randn(64, 48, dtype=torch.float64), torch.randn(64, 48, dtype=torch.float64)
    square, column = torch.randn(48, 48, dtype=torch.float64), torch.randn(64, 1, dtype=torch.float64)
    for a, b in ((x, y), (square, square), (x[:20], y[:20]), (x, column), (x, y[:1]), (square, y[3])):
        assert torch.allclose(combine(a, b), (a * b).sum(-1), rtol=1e-12)
    assert not fusion._Work.refused


def test_a_machine_without_a_compiler_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile(graph: object, examples: object) -> object:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr("torch._inductor.compile", compile)
    assert _told_once(monkeypatch, caplog) == "no C++ compiler"


def test_whoever_switches_the_compiler_off_is_heeded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with torch._dynamo.config.patch(disable=True):
        assert _told_once(monkeypatch, caplog) == "TORCH_COMPILE_DISABLE is set"


def _told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> str:
    """The reason."""
    monkeypatch.setattr(fusion, "PATIENCE", 0)
    double = fusion.fused(lambda x: x * 2)
    with caplog.at_level(logging.WARNING, "adamw_triton"):
        for _ in range(2):
            assert double(torch.ones(5000)).sum() == 10_000
    message, reason = caplog.messages[0].split(": ")
    assert caplog.messages == [f"{message}: {reason}"]
    assert message == "torch's compiler failed, AdamW on CPU tensors runs several times slower"
    return reason


@pytest.mark.parametrize(
    "state_format",
    [
        *(Float32(), Float32(amsgrad=True), Blockwise8(128)),
        *(Float32(weights="stochastic"), Blockwise8(128, "stochastic"), Blockwise8(128, "remainder")),
    ],
    ids=str,
)
def test_all_is_compiled_before_anything_is_written(
    state_format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shape has a graph of its own here, and none is missing when the update is written."""
    problem = Problem(state_format, torch.bfloat16)
    before = [bits.clone() for bits in problem.bits()]
    compiled, untouched, called = [], [], []

    class Graph:
        def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
            self.function, self.shapes = function, [tensor.shape for tensor in tensors]
            compiled.append(self)
            untouched.append(all(map(torch.equal, problem.bits(), before)))

        def fits(self, tensors: Sequence[Tensor]) -> bool:
            return [tensor.shape for tensor in tensors] == self.shapes

        def __call__(self, *tensors: Tensor) -> Any:
            called.append(self)
            return self.function(*tensors)

    monkeypatch.setattr(fusion, "_Graph", Graph)
    monkeypatch.setattr(fusion, "PATIENCE", 0)
    fused = {reference: ("_update_8bit",), codes: ("_encode_v", "_encode_m")}
    for module, names in fused.items():  # forget all graphs
        for name in names:
            monkeypatch.setattr(module, name, fusion.fused(getattr(module, name).__wrapped__))
    for name in ("_update_32bit", "_apart"):
        monkeypatch.setattr(reference, name, functools.cache(getattr(reference, name).__wrapped__))
    monkeypatch.setattr(reference, "_rehearsed", defaultdict(set))
    problem.step(1)
    assert compiled
    assert all(untouched)
    assert set(called) == set(compiled)
    assert fusion._Work.done < fusion.SMALL * 128  # what is never compiled


@pytest.mark.slow
def test_threads_that_compile_at_once_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "PATIENCE", 0)
    functions = [fusion.fused(lambda x, n=n: x.mul_(n).add_(1).sqrt_()) for n in range(1, 5)]
    given = [torch.rand(50 + n) for n in range(4)]
    expected = [(x * n + 1).sqrt() for n, x in enumerate(given, 1)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda function, x: function(x), functions, given))
    assert not fusion._Work.refused
    assert all(map(torch.allclose, given, expected))
