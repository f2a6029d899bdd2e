"""A process in which Triton compiles: in that of the tests it interprets, for good."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")


def in_compiling_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module gives there; what it raises is raised here. One process serves all tests,
    and keeps what it has compiled."""
    return _process().submit(function, *arguments).result()


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """Before anything imports Triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.pop("ADAMW_TRITON_COMPILED", None)
    import torch

    torch.set_num_threads(1)
