"""Steps from alternating streams: what a step sends is read on the stream it was sent on, and on no other.

There is nothing to wait for then, and nothing can be freed on one stream while another still reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamw_triton import AdamW
from adamw_triton.step import batch
from adamw_triton_kernels import launch, tables
from tests.optimizer.problems import parameters


class Streams(TorchDispatchMode):
    """Notes on which stream each memory was made, and who reads it on another. What is the user's own to
    order does not count: parameters, gradients, state and step counts."""

    def __init__(self) -> None:
        super().__init__()
        self._current = 0
        self._made: dict[
            int, tuple[int, Tensor]
        ] = {}  # with a tensor that keeps the memory from coming again
        self._common: list[Tensor] = []
        self.strayed: list[str] = []

    @contextmanager
    def on(self, stream: int, common: Sequence[Tensor]) -> Iterator[None]:
        self._current, self._common = stream, list(common)
        with pytest.MonkeyPatch.context() as patch, self:
            for module in (tables, batch):
                patch.setattr(module, "stream_of", lambda device: stream)
            patch.setattr(launch, "call", self._launched)
            yield

    def _launched(self, *arguments: Any) -> None:
        self._read("a kernel", [leaf for leaf in arguments[-1] if isinstance(leaf, Tensor)])

    def _read(self, name: str, tensors: Sequence[Tensor]) -> None:
        common = set(map(_memory, self._common))
        for tensor in tensors:
            stream, _ = self._made.get(_memory(tensor), (self._current, tensor))
            if stream != self._current and _memory(tensor) not in common:
                self.strayed.append(f"{name} on stream {self._current} reads what was sent on {stream}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._read(str(func), taken)
        outputs = func(*args, **(kwargs or {}))
        for made in tree_leaves(outputs):
            if isinstance(made, Tensor) and _memory(made) not in set(map(_memory, taken)):
                self._made[_memory(made)] = (self._current, made)
        return outputs


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("moving", [False, True], ids=["in place", "moving"])
@pytest.mark.parametrize("variant", ["32bit", "8bit"])
def test_what_a_step_sends_stays_on_its_stream(
    variant: str, moving: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capturable optimizer: on the CPU its tables are what a GPU's would be, the step's numbers too."""
    if backend == "torch":
        pytest.skip("sends no tables")
    params = parameters(((5000,), (3,), (40, 50)))
    optimizer = AdamW(params, variant=variant, capturable=True)
    streams = Streams()
    for stream in (1, 2, 1, 1, 2, 3):
        for param in params:
            if moving or param.grad is None:
                param.grad = torch.ones_like(param)
        common = [*params, *(param.grad for param in params if param.grad is not None)]
        for buffer in optimizer._store.buffers:
            common += [*buffer.arrays.values(), buffer.steps]
        with streams.on(stream, common):
            optimizer.step()
    assert streams.strayed == []
