"""Names for what happens, in profilers' timelines and in torch's memory snapshots. They cost nothing where
nobody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]  # 0.1 us; record_function 11
from torch.profiler import record_function

PAGE_IN, UPDATE, PAGE_OUT, RELEASE = (
    f"adamw_triton::{what}" for what in ("page_in", "update", "page_out", "release")
)
STATE, STAGING = "adamw_triton: optimizer state", "adamw_triton: staging"

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A range of that name, if a profiler of torch's looks at this thread: in its trace, and an NVTX range
    under ``torch.autograd.profiler.emit_nvtx()``, for Nsight. It is the host's time, in which work is queued;
    what is queued in it, torch's profiler shows below it."""
    return record_function(name) if _profiler_enabled() else _NOTHING


@contextmanager
def allocated_as(name: str) -> Iterator[None]:
    """Blocks of a GPU's memory that are allocated in here have that name in torch's memory snapshots
    (``torch.cuda.memory._dump_snapshot``), where its release can give names."""
    memory = torch.cuda.memory
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not (in_use and hasattr(memory, "_set_memory_metadata")):
        yield
        return
    before = memory._get_memory_metadata()
    memory._set_memory_metadata(name)
    try:
        yield
    finally:
        memory._set_memory_metadata(before)
