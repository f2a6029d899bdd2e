"""Ctrl-C and failures in the middle of a step: none of it or all of it, or a refusal to train on."""

from __future__ import annotations

import copy
import functools
import gc
import linecache
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import adamw_triton
from adamw_triton import AdamW
from adamw_triton.interrupts import DeferredInterrupt
from adamw_triton.state import placement
from adamw_triton.step import batch
from adamw_triton_kernels import Arrays, Call, Update, fusion, reference
from tests.amount import WHOLE
from tests.optimizer.problems import bits, parameters, set_grads, state_bits

VARIANTS = ("8bit", "paged_32bit", "paged_8bit")
HERE = str(Path(adamw_triton.__file__).parent)
KERNELS = str(Path(reference.__file__).parent)
SHAPES = ((4500,), (10,), (4100,))
NEVER = -1


@pytest.fixture(autouse=True)
def pages_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", 9000)


@functools.cache
def _is_ours(file: str) -> bool:
    return file.startswith((HERE, KERNELS)) or "contextlib" in file


@functools.cache
def _is_with(file: str, line: int) -> bool:
    return linecache.getline(file, line).lstrip().startswith("with ")


class Interrupt:
    """Raises SIGINT at the n-th line of ours that is executed within ``with``; notes which line each was, up
    to that."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.lines: list[tuple[str, int]] = []

    def __enter__(self) -> Interrupt:
        sys.settrace(self._frame)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _frame(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return self._line if _is_ours(frame.f_code.co_filename) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if _is_with(frame.f_code.co_filename, frame.f_lineno):
            return self._line  # on the way out, nothing can come between: only a trace could
        self.lines.append((frame.f_code.co_filename, frame.f_lineno))
        if len(self.lines) == self.at:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return self._line


def everything(optimizer: AdamW) -> tuple[list[bytes], list[dict[str, bytes]]]:
    return bits(optimizer.param_groups[0]["params"]), state_bits(optimizer)


def trained(variant: str, steps: int) -> AdamW:
    params = parameters(SHAPES)
    optimizer = AdamW(params, variant=variant, **({"transfer": "copy"} if "paged" in variant else {}))
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return optimizer


def interrupted_at(
    at: int, variant: str, steps_before: int, kept: list[BaseException], rehearsed: dict[Any, set[int]]
) -> tuple[AdamW, list[tuple[str, int]]]:
    """The optimizer afterwards, and the lines that were executed. A prompt keeps the last exception, and with
    it all that was going on: what only that would end has not ended. ``rehearsed``: what the steps before
    need not rehearse, which takes longer than they do."""
    reference._rehearsed.update(copy.deepcopy(rehearsed))
    optimizer = trained(variant, steps_before)
    set_grads(optimizer.param_groups[0]["params"], steps_before)
    reference._rehearsed.clear()
    interrupt = Interrupt(at)
    try:
        with interrupt:
            optimizer.step()
    except KeyboardInterrupt as error:
        kept.append(error)
    else:
        assert at == NEVER or len(interrupt.lines) < at, "the interrupt was lost"
    return optimizer, interrupt.lines


class AsItIs:
    def __init__(self, function: Callable[..., Any], _: object) -> None:
        self.function = function

    def fits(self, _: object) -> bool:
        return True

    def __call__(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether what can be compiled is, by a compiler that leaves it as it is."""
    monkeypatch.setattr(fusion._Work, "done", 0)
    monkeypatch.setattr(fusion, "PATIENCE", 0 if request.param else 1 << 60)
    monkeypatch.setattr(fusion, "_Graph", AsItIs)


STRIDE = 1 if WHOLE else 3


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("steps_before", "compiled"), [(0, False), (2, True)], indirect=["compiled"], ids=str
)
def test_an_interrupt_at_any_line_of_a_step(variant: str, steps_before: int) -> None:
    """The first and the last time that it is executed, at every third of these moments. Afterwards all
    parameters and their state are either as before or as after, nothing is held, and training goes on."""
    kept: list[BaseException] = []
    gc.disable()  # a finalizer that the interrupt hits would only print
    try:
        expected = [everything(trained(variant, steps_before + i)) for i in range(3)]
        rehearsed = dict(reference._rehearsed)
        _, lines = interrupted_at(NEVER, variant, steps_before, kept, rehearsed)
        first = {line: at for at, line in reversed(list(enumerate(lines, 1)))}
        last = {line: at for at, line in enumerate(lines, 1)}
        points = sorted({*first.values(), *last.values()})
        assert len(points) > 200
        points = points[::STRIDE]
        outcomes = set()
        for at in points:
            optimizer, _ = interrupted_at(at, variant, steps_before, kept, rehearsed)
            with optimizer._store._unless_held() as free:
                assert free, f"line {at}"
            values = bits(optimizer.param_groups[0]["params"])
            done = [values == params for params, _ in expected].index(True)
            outcomes.add(done)
            for step in range(done, 2):
                set_grads(optimizer.param_groups[0]["params"], steps_before + step)
                optimizer.step()
            assert everything(optimizer) == expected[2], f"line {at}"
        assert outcomes == {0, 1}
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_update_leaves_an_optimizer_that_says_so(
    variant: str, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = trained(variant, 2)
    saved, saved_params = optimizer.state_dict(), bits(optimizer.param_groups[0]["params"])
    saved = {**saved, "state": {k: {n: t.clone() for n, t in e.items()} for k, e in saved["state"].items()}}
    params = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    expected = everything(trained(variant, 3))
    calls = 0

    def update_for(name: str, device: torch.device) -> Update:
        def prepare(*arguments: Any) -> Call:
            call = getattr(reference, name).prepare(*arguments)

            def update(arrays: Arrays) -> None:
                nonlocal calls
                calls += 1
                if calls == failing:
                    raise RuntimeError("out of luck")
                call(arrays)

            return update

        return Update(prepare)

    optimizer._places._batches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "update_for", update_for)
        set_grads(optimizer.param_groups[0]["params"], 2)
        with pytest.raises(RuntimeError, match="out of luck"):
            optimizer.step()
        optimizer._places._batches.clear()
    for refused in (optimizer.step, optimizer.state_dict, optimizer.offload, optimizer.__getstate__):
        with pytest.raises(RuntimeError, match=r"failed halfway.*load_state_dict.*RuntimeError: out of luck"):
            refused()
    with torch.no_grad():
        for param, value in zip(optimizer.param_groups[0]["params"], params, strict=True):
            param.copy_(value)
    optimizer.load_state_dict(saved)
    assert bits(optimizer.param_groups[0]["params"]) == saved_params
    optimizer.step()
    assert everything(optimizer) == expected


def test_what_fails_before_anything_is_written_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when staging does not fit the GPU."""
    optimizer = trained("paged_8bit", 0)
    set_grads(optimizer.param_groups[0]["params"], 0)
    with monkeypatch.context() as patch:
        patch.setattr("adamw_triton.paging.device.HostDevice.allocate", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match=r"3 staging buffers of 4\.5 KiB.*memory_budget"):
            optimizer.step()
    optimizer.step()
    assert everything(optimizer) == everything(trained("paged_8bit", 1))


def out_of_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """SIGINTs that the user's own handler sees."""
    seen: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGINT, previous)


def test_the_users_own_handler_is_called_once_and_stays(caught: list[int]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with DeferredInterrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert caught == []
    assert caught == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_error_inside_comes_out(caught: list[int]) -> None:
    def interrupted_and_failing() -> None:
        with DeferredInterrupt():
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted_and_failing()
    assert caught == [signal.SIGINT]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_ignored_interrupts_stay_ignored(handler: signal.Handlers, caught: list[int]) -> None:
    signal.signal(signal.SIGINT, handler)
    with DeferredInterrupt():
        assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_step_without_it() -> None:
    problems = []

    def work() -> None:
        try:
            trained("paged_8bit", 1)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == []
