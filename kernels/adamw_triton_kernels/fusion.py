"""One pass over memory instead of many: functions of CPU tensors, compiled once that pays.

torch runs a formula operation by operation, each a pass over its operands. Its compiler makes one loop
of it in C++, several times faster, but takes seconds. So a function runs as it stands until all of them
together have done about as much work as compiling costs, and compiled from then on. No result tells which:
the bits are the same (tests/kernels/test_fusion.py).

``torch.compile`` would look at every call anew, for 50 microseconds and more. Here the function is traced
and its graph compiled, and what the graph takes for granted is checked once for each set of shapes: a call
costs some 15.

Compiling is for the time before a step writes: ``rehearse`` does it, on tensors without memory, and what is
to ``perform`` compiles nothing.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

import torch
from torch import Tensor

PATIENCE = 1 << 28
"""Elements that are updated before anything is compiled: some seconds of work for 8-bit state."""
SMALL = 16
"""Calls on fewer rows (elements or blocks) are not compiled: to the compiler, 0 and 1 are special."""
LARGE = 1 << 20
"""Elements that code is made for, though it takes any number: enough to be worth every thread."""

_DTYPE_AND_SHAPE = operator.attrgetter("dtype", "shape")
_log = logging.getLogger("adamw_triton")
_T = TypeVar("_T")
_doing: ContextVar[str | None] = ContextVar("_doing", default=None)


class _Work:
    done = 0
    refused = False
    """No compiler, most often."""


def compiles() -> bool:
    """Whether calls are compiled by now."""
    return _Work.done >= PATIENCE and not _Work.refused


def in_one_pass() -> bool:
    """Whether the code that asks is being compiled."""
    return _doing.get() == "tracing"


def rehearse(function: Callable[..., None], *arguments: Any) -> None:
    """Have a function of meta tensors compile what it would need on the CPU."""
    _while("rehearsing", function, *arguments)


def perform(function: Callable[..., None], *arguments: Any) -> None:
    """Have it compile nothing: what was not rehearsed runs as it stands, to the same bits."""
    _while("performing", function, *arguments)


def _while(doing: str, function: Callable[..., _T], *arguments: Any) -> _T:
    """In a context of its own, which no Ctrl-C leaves open: a thread that rehearses for ever never trains."""

    def within() -> _T:
        _doing.set(doing)
        return function(*arguments)

    return copy_context().run(within)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of contiguous tensors, which may write into them; its work is the size of the first."""
    graphs: dict[Any, list[_Graph]] = defaultdict(list)  # by threads, dtypes and dimensions
    known: dict[Any, _Graph] = {}  # by threads, dtypes and shapes

    def compiled(key: Any, tensors: Sequence[Tensor]) -> _Graph:
        from torch._dynamo.convert_frame import compile_lock  # of what the user compiles, too

        with compile_lock:  # torch's compiler is not for several threads at once
            if key not in known:
                alike = graphs[(key[0], *[(tensor.dtype, tensor.ndim) for tensor in tensors])]
                found = next((graph for graph in alike if graph.fits(tensors)), None)
                if found is None:
                    _log.info("AdamW on CPU tensors is compiled: some seconds, once (%s)", function.__name__)
                    found = _Graph(function, tensors)
                    alike.append(found)
                known[key] = found
            return known[key]

    def graph_for(tensors: Sequence[Tensor]) -> _Graph | None:
        """Compiled now if need be; None if that is not to be, or fails."""
        if not compiles() or tensors[0].shape[0] < SMALL:
            return None
        key = (torch.get_num_threads(), *map(_DTYPE_AND_SHAPE, tensors))
        graph = known.get(key)
        if graph is not None or _doing.get() == "performing":
            return graph
        try:
            return compiled(key, tensors)
        except Exception as error:  # whatever a compiler throws
            _Work.refused = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _log.warning(
                "torch's compiler failed, AdamW on CPU tensors runs several times slower: %s", reason
            )
            return None

    @functools.wraps(function)
    def run(*tensors: Tensor) -> Any:
        first = tensors[0]
        if torch.compiler.is_compiling():
            return function(*tensors)
        if _doing.get() == "rehearsing":
            graph_for([torch.empty_like(tensor, device="cpu") for tensor in tensors])
            return function(*[tensor.to("meta") for tensor in tensors])  # some are there
        if not first.is_cpu:
            return function(*tensors)
        graph = graph_for(tensors)
        if graph is None:
            _Work.done += first.numel()
            return function(*tensors)
        return graph(*tensors)

    return run


class _Graph:
    """A function, compiled for tensors of certain dtypes and of many shapes."""

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        import torch._dynamo
        import torch._inductor  # the compiler, which takes a second to import
        from torch.fx.experimental.proxy_tensor import make_fx

        if torch._dynamo.config.disable:
            raise RuntimeError("TORCH_COMPILE_DISABLE is set")
        traced = make_fx(lambda *each: function(*each), tracing_mode="symbolic")
        graph = _while("tracing", traced, *[_lengthened(tensor, tensors[0]) for tensor in tensors])
        self._inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        with torch._dynamo.utils.get_metrics_context():  # where the compiler's cache counts its hits
            self._call = torch._inductor.compile(graph, self._inputs)
        if not self.fits(tensors):
            raise RuntimeError(f"no code for shapes {[tuple(tensor.shape) for tensor in tensors]}")

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all that was taken for granted of the shapes holds of these."""
        shapes = self._inputs[0].fake_mode.shape_env
        return bool(shapes.evaluate_guards_for_args(self._inputs, tensors))

    def __call__(self, *tensors: Tensor) -> Any:
        return self._call(*tensors)


def _lengthened(tensor: Tensor, first: Tensor) -> Tensor:
    """In its stead, one as long as the first would be with ``LARGE`` elements, if it is as long as that."""
    if tensor.shape[:1] != first.shape[:1] or tensor.ndim != first.ndim:
        return tensor
    return tensor.new_empty(LARGE // first[0].numel() + 1, *tensor.shape[1:])
