"""Gradient release: what has its gradient is stepped while backward runs, and the gradient is freed.

A hook on each parameter hears when its gradient is final in a backward: after all contributions of a tied
one, and with all that has been accumulated before. From then on the order is that of any step, for a bucket
of parameters: ``update``. ``step()`` closes the step: what is left over is updated.

Weights are therefore a step ahead before ``step()`` is called, some of them before others. A second backward
cannot add to what has been used up, and one that fails leaves a step half done: both are said by name.

In backwards that are not the last before a step, gradients stay where they are; or a bucket of them is added
to sums elsewhere (``Adding``) and freed. What has arrived and waits for its bucket is added at such a
backward's end: were it still there in the next one, autograd would add to it first, and round otherwise.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from adamw_triton.interrupts import DeferredInterrupt
from adamw_triton.state import placement
from adamw_triton.step.buckets import Buckets, shared_out
from adamw_triton.telemetry.spans import RELEASE, span
from adamw_triton_kernels.tables import stream_of

_log = logging.getLogger("adamw_triton")

_REMEMBERED = 1024
"""Buckets of which it is known what came next."""
Update = Callable[[Sequence[Tensor], bool, Sequence[Tensor]], None]
"""Of parameters, by their gradients; whether they are the first of a step; and those that came next the last
time."""


class Adding(NamedTuple):
    """Where gradients add up that are not to stay."""

    add: Callable[[Sequence[Tensor], Sequence[Tensor]], None]
    """A bound method: adds the gradients of parameters to their sums and drops them; and those that came next
    the last time."""
    held: dict[int, Tensor]
    """Parameters that have a sum, by id, which ``update`` uses up. What is taken out begins anew."""


class Release:
    """Args, which are bound methods and held weakly:
    update: updates these parameters by their gradients; that may still be under way afterwards.
    join: what is queued next on the current stream happens after all updates; given True, the host
        waits for them too.
    name: what a message calls a parameter.
    adding: None: gradients of several backwards add up where they are.
    """

    def __init__(
        self,
        update: Update,
        join: Callable[[bool], None],
        name: Callable[[Tensor], str],
        adding: Adding | None = None,
    ) -> None:
        self._update = weakref.WeakMethod(update)
        self._join = weakref.WeakMethod(join)
        self._add = None if adding is None else weakref.WeakMethod(adding.add)
        self._held = {} if adding is None else adding.held
        self._name = weakref.WeakMethod(name)
        self._buckets = Buckets(placement.BUCKET_BYTES)
        self._hooks: dict[int, Any] = {}
        """By id of the parameter, what removes it."""
        self._is_left = False
        self._next: dict[frozenset[int], Sequence[Tensor]] = {}
        """What was stepped after these the last time."""
        self._last: frozenset[int] = frozenset()
        self._ahead: set[int] = set()
        """Ids of parameters that have been stepped since the last ``close``."""
        self._running: dict[int, Callable[[], _End | None]] = {}
        """Backwards that have not come to their end, by the engine's number, and what it will call there: it
        drops that when one fails."""
        self._accumulating = weakref.WeakSet[_Block]()
        """Blocks that say so; one that an interrupt has left open is over when nobody has it any more."""
        self._is_closing = False
        self._lock = threading.RLock()  # each device has a thread of autograd's

    def __del__(self) -> None:
        for hook in self._hooks.values():
            hook.remove()

    def watch(self, groups: Iterable[Mapping[str, Any]], *, of_others: bool = True) -> None:
        """Hear of the gradients of all parameters that require some by now. ``of_others``: also of those that
        another optimizer hears of, which is still there and would step them first."""
        for group in groups:
            for param in group["params"]:
                if not param.requires_grad or not param.is_leaf or is_lazy(param):
                    continue
                hears = _OF_PARAM[param]() if param in _OF_PARAM else None
                if hears is None or (of_others and hears is not self):
                    if hears is not None:
                        hears._leave(param)
                    _OF_PARAM[param] = weakref.ref(self)
                    self._hooks[id(param)] = param.register_post_accumulate_grad_hook(_Hook(self))

    def _leave(self, param: Tensor) -> None:
        """To an optimizer that was made later."""
        self._hooks.pop(id(param)).remove()
        if not self._is_left:
            self._is_left = True
            _log.warning(
                "gradient_release: %s belongs to an optimizer made before, which is still referenced: from "
                "now on the new one alone steps it during backward, and whatever else both have",
                self._called(param),
            )

    def accumulating(self) -> AbstractContextManager[None]:
        """Around backwards that are not the last before a step."""
        return _Block(self._accumulating)

    @_disable_dynamo
    def arrived(self, param: Tensor) -> None:
        """The gradient of a parameter is final in this backward."""
        is_last = not self._accumulating and _syncs()
        if not is_last and self._add is None:
            return
        with self._lock:
            if id(param) in self._ahead:
                raise RuntimeError(self._twice(param))
            _check_alone()
            self._note_backward(is_last)
            try:
                for bucket in self._buckets.arrived(param, stream_of(param.device)):
                    self._step(bucket) if is_last else self._accumulate(bucket)
            except BaseException:
                self._joined()  # autograd will not call `ended`
                raise

    @_disable_dynamo
    def ended(self, task: int, is_last: bool) -> None:
        """A backward has come to its end; those within it, of reentrant checkpoints, before it. From now on
        the weights may be read on its streams."""
        with self._lock:
            self._joined()
            try:
                if not is_last and self._alive() == {task}:
                    for bucket in self._buckets.rest():
                        self._accumulate(bucket)
                    self._last = frozenset()
            except BaseException:
                self._running[task] = _gone  # whatever keeps the error keeps what autograd has called
                raise
            self._running.pop(task, None)

    @_disable_dynamo
    def drop_sums(self) -> None:
        """Have them begin anew: gradients have been dropped."""
        with self._lock:
            self._held.clear()
            self._buckets.drop()
            if not self._ahead:
                self._running.clear()

    def close(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Step what is left over: there are no gradients any more, and no sums.

        Raises:
            RuntimeError: backward has failed, with some parameters stepped already or some gradients in their
                sums; or what was stepped has a gradient again.
        """
        with self._lock:
            self._joined()  # whatever comes of it, the weights may be read
            if self._running and (self._ahead or self._held):
                raise RuntimeError(self._failed())
            params = [param for group in groups for param in group["params"]]
            left = [param for param in params if param.grad is not None]
            again = [param for param in left if id(param) in self._ahead]
            if again:
                raise RuntimeError(
                    f"gradient_release: {self._called(again[0])} has a gradient again, after it was used up, "
                    f"and so have {len(again) - 1} more: somebody puts them back, as DDP does. Make the "
                    "optimizer with gradient_release=False, or the model without DDP"
                )
            if left and not self._accumulating and not _syncs():
                _say_kept()
            with DeferredInterrupt():  # or what is stepped would not count as that
                self._is_closing = True
                self._step(left)
                summed = [param for param in params if id(param) in self._held]
                for bucket in shared_out(summed, placement.BUCKET_BYTES):
                    self._step(bucket)
                self._joined()
                self.begin()
            self.watch(groups, of_others=False)

    def abandon(self, groups: Iterable[Mapping[str, Any]]) -> int:
        """Drop all gradients, and let what has been stepped be; how many parameters that were."""
        with self._lock:
            ahead = len(self._ahead)
            for group in groups:
                for param in group["params"]:
                    param.grad = None
            self._joined()
            self.begin()
            return ahead

    def begin(self) -> None:
        """Another step, whatever became of the last one."""
        self._buckets.rest()
        self._ahead.clear()
        self._held.clear()
        self._last = frozenset()
        self._running.clear()
        self._is_closing = False

    def _step(self, params: Sequence[Tensor]) -> None:
        update = self._update()
        # Others may have dropped gradients since.
        params = [param for param in params if param.grad is not None or id(param) in self._held]
        if update is None or not params:
            return
        following = self._note_order(params)
        with DeferredInterrupt():  # what has been stepped is said to be, whatever comes
            with torch.no_grad(), span(RELEASE):
                update(params, not self._ahead, following)
            for param in params:
                param.grad = None
            self._ahead.update(map(id, params))

    def _accumulate(self, params: Sequence[Tensor]) -> None:
        add = None if self._add is None else self._add()
        params = [param for param in params if param.grad is not None]
        if add is None or not params:
            return
        with torch.no_grad():
            add(params, self._note_order(params))

    def _note_order(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """What came after these the last time."""
        these = frozenset(map(id, params))
        if len(self._next) > _REMEMBERED:  # where they come in another order every time
            self._next.clear()
        self._next[self._last] = params
        self._last = these
        return self._next.get(these, ())

    def _note_backward(self, is_last: bool) -> None:
        task: int = torch._C._current_graph_task_id()
        if task in self._running:
            return
        if failed := self._running.keys() - self._alive():
            if self._ahead or self._held:
                raise RuntimeError(self._failed())
            self._buckets.drop()
            for each in failed:  # nothing came of them
                del self._running[each]
        end = _End(self, task, is_last)
        self._running[task] = weakref.ref(end)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(end)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: a backward has failed, and neither has been given up what it left nor the step.
        """
        with self._lock:
            if (self._ahead or self._held) and self._running.keys() - self._alive():
                raise RuntimeError(self._failed())

    def _alive(self) -> set[int]:
        """Backwards that run: this one, and those that it runs within."""
        return {task for task, end in self._running.items() if end() is not None}

    def dropped(self) -> None:
        """A backward has failed: whoever catches its error may read or replace the weights, on any stream."""
        self._joined(wait=True)

    def _joined(self, wait: bool = False) -> None:
        join = self._join()
        if join is not None:
            join(wait)

    def _twice(self, param: Tensor) -> str:
        if self._is_closing:
            return (
                f"gradient_release: the last step() failed with {len(self._ahead)} parameters stepped: call "
                "it again, or optimizer.abandon_step(), before another backward"
            )
        if self._running.keys() - {torch._C._current_graph_task_id()}:
            return self._failed()
        return (
            f"gradient_release: {self._called(param)} has got a second gradient before step(), and the first "
            "is used up: all backwards but the last before a step belong into `with "
            "optimizer.accumulating():`. (Reentrant checkpoints of layers that share a parameter have "
            "several in one backward: use use_reentrant=False)"
        )

    def _called(self, param: Tensor) -> str:
        name = self._name()
        return "a parameter" if name is None else name(param)

    def _failed(self) -> str:
        if not self._ahead:
            return (
                "gradient_release: a backward has failed while gradients add up in host memory (those of "
                f"{len(self._held)} parameters): of its own some may be in the sums, and some not. Begin the "
                "step anew by optimizer.zero_grad(), which drops the sums"
            )
        return (
            f"gradient_release: a backward has failed after {len(self._ahead)} of {len(self._hooks)} "
            "parameters were stepped, which are a step ahead of the others. Load a checkpoint of the model "
            "and of the optimizer; or go on as it is, by optimizer.abandon_step()"
        )


class _Block(AbstractContextManager[None]):
    """Open while it is in the set."""

    def __init__(self, of: weakref.WeakSet[_Block]) -> None:
        self._of = of

    def __enter__(self) -> None:
        self._of.add(self)

    def __exit__(self, *_: object) -> None:
        self._of.discard(self)


_OF_PARAM = WeakIdKeyDictionary()
"""By parameter, the release that hears of it, weakly."""


class _End:
    """What autograd calls at the end of a backward."""

    def __init__(self, release: Release, task: int, is_last: bool) -> None:
        self._release = weakref.ref(release)
        self._task, self._is_last = task, is_last
        self._called = False

    def __call__(self) -> None:
        self._called = True
        release = self._release()
        if release is not None:
            release.ended(self._task, self._is_last)

    def __del__(self) -> None:
        release = None if self._called else self._release()
        if release is not None:
            release.dropped()


def _gone() -> None:
    """In place of a reference to what autograd has dropped."""


class _Hook:
    """Knows the release weakly: parameters outlive optimizers. It is not copied with a parameter."""

    def __init__(self, release: Release) -> None:
        self._release = weakref.ref(release)

    def __call__(self, param: Tensor) -> None:
        release = self._release()
        if release is not None:
            release.arrived(param)


def _syncs() -> bool:
    """Whether the backward that runs is the last before a step, if it is accelerate (and a Trainer) that
    counts them."""
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.GradientState._shared_state:
        return True
    return bool(accelerate.GradientState().sync_gradients)


@functools.cache
def _say_kept() -> None:
    _log.warning(
        "gradient_release: gradients were kept until step(), for accelerate says that their backward was not "
        "the last before it (GradientState().sync_gradients is False), as an interrupted Trainer leaves it; "
        "accelerate.state.GradientState._reset_state() clears it"
    )


def _check_alone() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"gradient_release=True is for one process, and there are {distributed.get_world_size()}: "
            "gradients would be averaged after they have been used up. Make the optimizer with "
            "gradient_release=False"
        )
