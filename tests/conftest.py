"""Without a GPU, Triton kernels run in Triton's interpreter, which has to be asked for before triton is
imported: also before torch imports it at some first step. The optimizer takes Triton for CPU tensors only
while the variable is set, so tests see it only where they are about the kernels.

With ``ADAMW_TRITON_COMPILED=sm_90`` nothing is interpreted, and every test of the optimizer and the kernels
steps CPU tensors by what Triton compiles for that GPU, on an emulator (bench/ptx/README.md)."""

import importlib
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import amount, interpreted

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` leaves it: tests of Ctrl-C send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

COMPILED = os.environ.get("ADAMW_TRITON_COMPILED", "")
if not torch.cuda.is_available() and not COMPILED:
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")
    interpreted.replace_language_once()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
    if not COMPILED and not amount.WHOLE:
        _leave_out(config, items)


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests that are no matter of arithmetic, interpreted kernels take a part of what plain torch does."""
    tables: dict[str, dict[pytest.Item, dict[str, int]]] = defaultdict(dict)
    for item in items:
        values = item.callspec.params if item.get_closest_marker("bookkeeping") else {}  # type: ignore[attr-defined]
        if values.get("backend") == "triton":
            test, _, _ = item.nodeid.partition("[")
            tables[test][item] = {name: id(value) for name, value in values.items()}
    gone = {item for table in tables.values() for item in set(table) - set(amount.covering(table))}
    if gone:
        config.hook.pytest_deselected(items=list(gone))
        items[:] = [item for item in items if item not in gone]


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """``compiled(90)``: for the rest of the test, CPU tensors are stepped by kernels compiled for sm_90; the
    `bench.compiled.session.Session` of it."""
    if not COMPILED:
        pytest.skip("in this process Triton interprets: see ADAMW_TRITON_COMPILED in tests/conftest.py")
    from bench.compiled import session

    with ExitStack() as stack:
        yield lambda capability, **settings: stack.enter_context(session.compiled(capability, **settings))


@pytest.fixture
def as_asked(request: pytest.FixtureRequest) -> bool:
    """Whether ``ADAMW_TRITON_COMPILED`` asks for compiled kernels, and then steps are made by them."""
    if COMPILED:
        request.getfixturevalue("compiled")(int(COMPILED.removeprefix("sm_")))
    return bool(COMPILED)


@pytest.fixture(autouse=True)
def backend(as_asked: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """CPU tensors are updated in plain torch; folders about the kernels override this."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return "triton" if as_asked else "torch"
