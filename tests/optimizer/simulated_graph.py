"""A CUDA graph without a GPU: what a step does with tensors is recorded, kernels included, and done again at
every replay, on the same memory and without the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamw_triton_kernels import launch, tables


class SimulatedGraph(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._work: list[Callable[[], None]] = []
        self._unseen = False

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record; what is recorded also happens, as the first replay."""
        call, write = launch.call, tables._write

        def recorded(*arguments: Any) -> None:
            self._hidden(call, *arguments)
            self._work.append(lambda: call(*arguments))

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(tables, "capturing", lambda: True)
            patch.setattr(tables, "_write", partial(self._hidden, write))
            patch.setattr(launch, "call", recorded)
            yield

    def _hidden(self, function: Callable[..., None], *arguments: Any) -> None:
        """What it does with tensors is not recorded."""
        self._unseen = True
        function(*arguments)
        self._unseen = False

    def replay(self) -> None:
        with torch.no_grad():
            for again in self._work:
                again()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if not self._unseen:
            # A result in memory of its own is in the same memory at every replay.
            taken = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            own = [isinstance(leaf, Tensor) and _memory(leaf) not in taken for leaf in tree_leaves(outputs)]

            def again() -> None:
                found = tree_leaves(func(*args, **kwargs))
                for before, after, is_own in zip(tree_leaves(outputs), found, own, strict=True):
                    if is_own:
                        before.copy_(after)

            self._work.append(again)
        return outputs


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
