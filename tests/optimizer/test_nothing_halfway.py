"""Whatever a step has to allocate, send or compile, it does before it writes. Each such call fails in its
turn, and nothing has changed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamw_triton import AdamW
from adamw_triton.state import placement
from adamw_triton_kernels import fusion, launch, runs, tables
from tests.optimizer.problems import bits, state_bits

VARIANTS: dict[str, dict[str, Any]] = {
    "32bit": {},
    "8bit": {},
    "8bit, capturable": {"variant": "8bit", "capturable": True},
    "paged_32bit": {"transfer": "copy"},
    "paged_8bit": {"transfer": "copy"},
}
FACTORIES = {"empty", "empty_strided", "empty_like", "new_empty", "new_zeros", "zeros", "zeros_like", "clone"}
FACTORIES |= {"arange", "cat", "stack", "full", "ones"}


class Failing(TorchDispatchMode):
    """The ``at``-th time that memory is allocated or a table is sent, it fails. What kernels and formulas
    make for themselves does not count: on a GPU there is no interpreter, and plain torch has temporaries."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at
        self._seen = 0
        self._counted: Callable[[str], bool] = lambda name: True

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        call, perform = launch.call, fusion.perform
        with pytest.MonkeyPatch.context() as patch, self:
            for module in (launch, tables):
                patch.setattr(module, "send", self._counting(module.send))
            patch.setattr(launch, "call", self._within(lambda name: False)(call))
            patch.setattr(fusion, "perform", self._within(FACTORIES.__contains__)(perform))
            yield

    @contextlib.contextmanager
    def _within(self, counted: Callable[[str], bool]) -> Iterator[None]:
        before, self._counted = self._counted, counted
        yield
        self._counted = before

    def _counting(self, send: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Any) -> Tensor:
            self._count()
            return send(*arguments)

        return counted

    def _count(self) -> None:
        self._seen += 1
        if self._seen == self._at:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if self._counted(func.overloadpacket.__name__):
            taken = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for made in tree_leaves(outputs):
                if isinstance(made, Tensor) and not made.is_meta and _memory(made) not in taken:
                    self._count()
        return outputs


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def parameters() -> list[Parameter]:
    """Of two formats, dtypes and memory orders, some of them small."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, generator=generator) for n in (4400, 30, 20, 4500)]
    made[0] = made[0].view(44, 100).t()
    return [Parameter(values.bfloat16() if n == 3 else values) for n, values in enumerate(made)]


def set_grads(params: Sequence[Parameter], step: int) -> None:
    """Each in memory of its own, the first in another order than its parameter; of the last some are
    misaligned."""
    generator = torch.Generator().manual_seed(1000 + step)
    for number, param in enumerate(params):
        memory = torch.randn(param.numel() + 1, generator=generator).to(param.dtype)
        begin = int(number == 1 and step % 2)
        param.grad = memory[begin : begin + param.numel()].view(param.shape)


def trained(variant: str, steps: int) -> AdamW:
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    optimizer = AdamW(groups, lr=0.01, **{"variant": variant, **VARIANTS[variant]})
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return optimizer


def everything(optimizer: AdamW) -> tuple[list[bytes], list[dict[str, bytes]]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return bits(params), state_bits(optimizer)


def mark(
    spec: launch.Build, key: Any, device: torch.device, programs: int, arguments: tuple[Any, ...]
) -> None:
    """In place of a kernel, which the interpreter takes its time for: counts up in all that one writes."""
    addresses, _, _, _, *state, count, _ = arguments
    for address in addresses[:count].tolist():
        ctypes.c_int16.from_address(address).value += 1
    for array in state:
        array.view(torch.uint8)[0] += 1


@pytest.fixture(autouse=True)
def several_pages(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", 9000)
    if backend == "triton":
        monkeypatch.setattr(launch, "call", mark)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_call_that_can_fail_fails_before_anything_is_written(variant: str, steps: int) -> None:
    before, after = (everything(trained(variant, number)) for number in (steps, steps + 1))
    at = failures = 0
    while True:
        at += 1
        optimizer = trained(variant, steps)
        runs._rooms.clear()
        set_grads([param for group in optimizer.param_groups for param in group["params"]], steps)
        try:
            with Failing(at).here():
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            failures += 1
        assert bits([param for group in optimizer.param_groups for param in group["params"]]) == before[0], at
        if steps:
            assert everything(optimizer) == before, at
        optimizer.step()
        assert everything(optimizer) == after, at
    assert everything(optimizer) == after
    assert failures >= 5
