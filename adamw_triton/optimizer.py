"""``AdamW``: a ``torch.optim.Optimizer`` over flat state buffers and multi-tensor updates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from adamw_triton import checkpoint
from adamw_triton.arguments import (
    OF_THE_OPTIMIZER,
    VARIANTS,
    check_accumulation,
    check_capture,
    check_clipping,
    check_group,
    check_implementation,
    check_keys,
    check_movable,
    check_paging,
    check_prefer,
    check_release,
    check_telemetry,
    check_unscaled,
    check_variant,
    check_weights,
    torch_defaults,
)
from adamw_triton.choices import AccumulateOn, Auto, Nonfinite, Prefer, StateFormat, Transfer, VariantName
from adamw_triton.interrupts import DeferredInterrupt
from adamw_triton.memory.lasting import lasting
from adamw_triton.memory.units import parse_bytes
from adamw_triton.paging.pager import never
from adamw_triton.paging.transfer import COPY
from adamw_triton.places.reservations import KEPT_BATCHES, KEPT_BUCKETS, Reservations
from adamw_triton.places.store import Store
from adamw_triton.places.sums import Summing
from adamw_triton.selection.auto import chooser_for
from adamw_triton.selection.plans import Plan
from adamw_triton.state.buffers import Scalars, begin_anew
from adamw_triton.state.placement import STAGES, sum_page
from adamw_triton.state.shards import any_shard
from adamw_triton.step.batch import Batch, Tensors
from adamw_triton.step.clipping import ELSEWHERE, PROPAGATE, SKIPPED, Clipping, Judged, describe
from adamw_triton.step.hyperparameters import Settings
from adamw_triton.step.release import Adding, Release
from adamw_triton.step.statistics import Statistics
from adamw_triton.step.stepped import Stepped
from adamw_triton.step.whole import WholeSteps
from adamw_triton.tensors import check_new_param, check_params, model_names, name_of, named
from adamw_triton_kernels import tables

if TYPE_CHECKING:
    from adamw_triton.telemetry.report import Report

_DECIDED = (*OF_THE_OPTIMIZER, "capturable")
"""Arguments that an optimizer keeps for good."""


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with 32-bit or blockwise 8-bit state.

    A drop-in for ``torch.optim.AdamW``: the arguments up to ``maximize`` are the same. Parameters
    and gradients may be fp32, bf16, fp16 (mixed at will) or complex64; all arithmetic is in fp32, so float64
    parameters are refused. Parameters without gradients are left alone, whatever they are.

    Args:
        params: parameters, parameter groups or named parameters. A group may set ``state_bits`` (8
            or 32) to override the variant.
        variant: where and how the moments m and v are kept.

            - ``"32bit"``: fp32, 8 bytes a parameter
            - ``"8bit"``: blockwise 8-bit codes, 2.03 bytes a parameter; tensors of under 4,096
              elements keep 32-bit state
            - ``"paged_32bit"``, ``"paged_8bit"``: the same in pinned host memory; a step streams it
              through a few staging buffers on the GPU, of 96 MiB in all
            - ``"auto"``: the first step chooses by the memory that is left when forward and backward have
              had their peak: 32-bit state on the GPU, else 8-bit, else 8-bit with as much as needed of
              it paged; ``plan`` says why. Where training comes to need more, more is paged. On the CPU,
              32-bit state unless only 8-bit fits.
        memory_budget: with ``"auto"`` or a paged variant, bytes that state and staging may take on each
            GPU (``"4GiB"`` or an int): what fits stays there, the rest is paged. None: with ``"auto"``
            what is left, else staging alone.
        prefer: of ``"auto"``: ``"speed"`` goes to 8 bits before it pages, ``"exact"`` pages before it goes
            to 8 bits.
        transfer: how paged state reaches the kernels: ``"copy"`` by the GPU's copy engines,
            ``"zero_copy"`` read and written in host memory by the kernels themselves, ``"auto"``
            whichever proves faster in the first four steps (with ``gradient_release`` it is ``"copy"``: what
            kernels read themselves holds up the backward that they run in). The results are the same bits.
        block_size: elements of the 8-bit format that share their scales, 128 or 256 (2.02 bytes).
        capturable: make ``step()`` safe to capture in a CUDA graph. Step counts are on the GPU then, and the
            host reads none of them; ``lr`` and ``betas`` may be tensors there, and a replay sees what they
            are, while numbers are those of the capture. Take a step before the capture, and capture
            again after anything but replays and steps. State is never paged.
        master_weights: keep weights of 16 bits exactly, as if they were fp32: the parameter is the exact
            weight rounded, and what it lacks is state, paged and saved like m and v: 2 bytes of a bf16
            weight, 4 of an fp16 one. A bf16 weight that somebody else writes between steps begins anew (a
            write through ``.data`` cannot be seen); one that is written at every step is as if to nearest.
            ``"auto"``: with ``variant="auto"``, if they fit on the GPU or the host.
        stochastic_rounding: round bf16 weights up or down in proportion to what is cut off, reproducibly:
            right on average, where rounding to nearest loses most small updates. ``"auto"``: with
            ``variant="auto"``, if exact weights do not fit.
        max_grad_norm: clip gradients to this global norm, as ``torch.nn.utils.clip_grad_norm_`` would before
            the step, in fp32 and without waiting for the GPU. The gradients themselves stay as they were;
            ``inf`` clips nothing, and ``grad_norm`` can be read.
        adaptive_clip: hold each parameter's gradient to this factor (1.05 in the paper) times the running
            average of its norm, which is state (AdaGC, arXiv:2502.11034): a spike in one tensor leaves the
            others alone. In its first 100 steps a parameter learns its average, the smallest norm so far, and
            is not held; the paper clips by a global norm of 1 then, as ``max_grad_norm=1.0`` does beside it.
            Of both limits the lower one holds. Gradients of norm 0 teach nothing. Not for what begins with
            gradients near zero, as LoRA's A does: the average follows by 0.1% a step, and would hold them
            for long.
        nonfinite: what becomes of a step with NaN or Inf among its gradients. ``"propagate"``: they go into
            weights and state. ``"skip"``: nothing changes, no weight, state or step count, and
            ``skipped_steps`` counts; step counts are on the GPU then. ``"raise"``: an error names tensors
            before anything is written, for which every step waits for the GPU. A norm above 3.4e38 counts as
            Inf.

            All three look at the gradients that this optimizer has. Where each rank has its own, norms are of
            a part: what FSDP (version 1) has flattened is refused, and under ZeroRedundancyOptimizer all but
            ``adaptive_clip``; of other engines' partitions nothing is known.
        gradient_release: step parameters while backward runs, some 64 MiB of gradients at a time, and free
            these: they never are there all at once. What comes out is the same to the bit. ``step()`` closes
            the step; hyperparameters are those at the time of backward. All backwards but the last before a
            step belong into ``accumulating()`` (under accelerate and in a Trainer that is known). There is no
            global norm before the end, so no ``max_grad_norm`` but ``inf``, which lets ``grad_norm`` be read;
            ``adaptive_clip`` works. What ``nonfinite`` skips or refuses is a bucket, not the step, and
            ``skipped_steps`` counts buckets. For one process, without a gradient scaler.
        accumulate_on: where the gradients of several backwards add up before a step: ``"gpu"``, where
            autograd leaves them, all of them, until the last backward; or, with ``gradient_release``,
            ``"host"``: each bucket is added into pinned host memory, 2 bytes of a bf16 parameter, and freed;
            in the last backward it comes back for its update. The bits are those of ``"gpu"``. ``step()``
            uses the sums up, ``zero_grad()`` and ``abandon_step()`` drop them; a model's own ``zero_grad()``
            does not know of them, and state dicts do not have them.
        accumulate_dtype: of the sums with ``accumulate_on="host"``. None: that of each gradient, in which
            every addition rounds. ``torch.float32``: 4 bytes a parameter, rounded to the gradient's dtype
            once, after the last has been added.
        telemetry: have the update say what it does: gradient, weight and update norms, moments, the share of
            weights whose update was rounded away, and more (``stats()``, ``diagnose()``). True: at every
            step; N: at every N-th, and the others run the plain kernels. Weights and state are the same to
            the bit. Replays of a CUDA graph say nothing. Where parameters are shards, the ranks add up at
            those steps; of what FSDP (version 1) has flattened, and under ZeroRedundancyOptimizer, each rank
            tells of its part.
        fused, foreach, differentiable: torch.optim.AdamW's choice among its implementations, taken for its
            callers' sake: the first two change nothing, ``differentiable=True`` is refused.

    State is allocated at the first ``step()``, for all parameters that require gradients. What
    ``state`` shows of paged state is in host memory, and complete once the GPU has done its work:
    ``state_dict()`` waits for that; whoever reads ``state`` itself calls ``torch.cuda.synchronize()``.

    Raises:
        ValueError: a hyperparameter is out of range, or ``amsgrad`` meets 8-bit state.
        TypeError: the dtype of a parameter that requires gradients is not supported.
    """

    # Of one that was pickled before there were these.
    max_grad_norm: float | None = None
    adaptive_clip: float | None = None
    prefer: Prefer = "speed"
    nonfinite: Nonfinite = PROPAGATE
    gradient_release: bool = False
    accumulate_on: AccumulateOn = "gpu"
    accumulate_dtype: torch.dtype | None = None
    telemetry: bool | int = False
    _spills: int = 0
    _release: Release | None = None
    _places: Reservations
    _whole: WholeSteps
    _clipping: Clipping
    _statistics: Statistics

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _DECIDED and name in self.__dict__:
            raise AttributeError(
                f"{name} is decided when an optimizer is made: make another one with {name}={value!r} and "
                "load this one's state_dict() into it"
            )
        super().__setattr__(name, value)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        *,
        variant: VariantName = "auto",
        memory_budget: int | str | None = None,
        prefer: Prefer = "speed",
        transfer: Transfer = "auto",
        block_size: int = 128,
        capturable: bool = False,
        master_weights: bool | Auto = "auto",
        stochastic_rounding: bool | Auto = "auto",
        max_grad_norm: float | None = None,
        adaptive_clip: float | None = None,
        nonfinite: Nonfinite = "propagate",
        gradient_release: bool = False,
        accumulate_on: AccumulateOn = "gpu",
        accumulate_dtype: torch.dtype | None = None,
        telemetry: bool | int = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        check_implementation(fused, foreach, differentiable)
        how = check_variant(variant, block_size, capturable)
        budget = check_paging(variant, memory_budget, transfer)
        check_prefer(prefer, variant)
        weights = check_weights(variant, master_weights, stochastic_rounding)
        check_clipping(max_grad_norm, adaptive_clip, nonfinite, capturable)
        check_release(gradient_release, max_grad_norm, capturable)
        check_accumulation(accumulate_on, accumulate_dtype, gradient_release, budget)
        check_telemetry(telemetry)
        if accumulate_on == "host" and budget is not None:
            budget -= STAGES * sum_page(budget)
        self._chooser = chooser_for(how, budget, block_size, capturable, weights, gradient_release, prefer)
        self.variant = variant
        self.memory_budget = memory_budget
        self.prefer = prefer
        self.transfer = transfer
        self.block_size = block_size
        self.capturable = capturable
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.max_grad_norm = max_grad_norm
        self.adaptive_clip = adaptive_clip
        self.nonfinite = nonfinite
        self.gradient_release = gradient_release
        self.accumulate_on = accumulate_on
        self.accumulate_dtype = accumulate_dtype
        self.telemetry = telemetry
        self._reset()
        defaults = {
            **torch_defaults(),
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "fused": fused,
            "foreach": foreach,
            "capturable": capturable,
        }
        check_group(defaults, how.bits)
        check_params(params)
        super().__init__(params, defaults)

    def __repr__(self) -> str:
        """torch's, and the variant, with what ``"auto"`` follows."""
        head, _, groups = super().__repr__().partition("\n")
        followed = "" if self._chooser.decided else " (decides at the first step)"
        if self.plan is not None:
            followed = f" ({self.plan.followed.label})"
        return f"{head}\nvariant: {self.variant}{followed}\n{groups}"

    @property
    def _store(self) -> Store:
        return self._places.store

    @property
    def plan(self) -> Plan | None:
        """What the first step of ``variant="auto"`` chose, and from what; None before it."""
        return self._chooser.plan

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step, unscaled and before clipping: fp32, of no dimension, on
        the device of the first. To read it is to wait for the step. None before the first one, and where
        neither clipping nor ``nonfinite`` wants to know it."""
        return self._clipping.norm

    @property
    def skipped_steps(self) -> int:
        """By ``nonfinite="skip"`` since this optimizer was made; state dicts do not have it. Waits for the
        last step."""
        return self._clipping.skipped

    def diagnose(self, *, model: torch.nn.Module | None = None, across_ranks: bool = False) -> Report:
        """What stands out in the last 64 steps that ``telemetry`` has looked at, in which tensors, since
        when, the likely cause and what to try. It prints as text, in a notebook as HTML, by rich as a table.
        Waits for the last step.

        Args:
            model: as in ``stats``.
            across_ranks: whether the ranks of torch.distributed's default process group have done the same,
                too. All of them have to ask.
        """
        from adamw_triton.telemetry.diagnosis import diagnose, of_all_ranks

        history = self._statistics.history()
        names = None if model is None else model_names(model, self.param_groups)
        return diagnose(history, names=names, ranks=of_all_ranks(history) if across_ranks else None)

    @property
    def spills(self) -> int:
        """How often memory ran short and state was moved to the host, since this optimizer was made."""
        return self._spills

    def stats(
        self, *, per_param: bool = False, wait: bool = True, model: torch.nn.Module | None = None
    ) -> dict[str, float]:
        """What the last step did that ``telemetry`` has looked at: a flat dict of ``"step"``, its number, and
        of what ``telemetry.observed.METRICS`` names, of all parameters together. Numbers go on from a loaded
        state; a step that raises, or that a gradient scaler leaves out, has none. Empty before there is one.

        Args:
            per_param: also ``"grad_norm/<name>"`` and so on, of each that had a gradient.
            wait: for that step; else the last one that has arrived from the GPU.
            model: whose names to use; None: those of ``named_parameters()``, if the optimizer was made of
                these, else each parameter's group and its place there.
        """
        history = self._statistics.history(wait)
        names = None if model is None else model_names(model, self.param_groups)
        return history[-1].flat(per_param, names) if history else {}

    @property
    def _summing(self) -> Summing | None:
        if self.accumulate_on != "host":
            return None
        budget = None if self.memory_budget is None else parse_bytes(self.memory_budget, "memory_budget")
        return Summing(self.accumulate_dtype, sum_page(budget))

    @property
    def _scalars(self) -> Scalars:
        adapts = self.adaptive_clip is not None
        return Scalars(self.capturable or self.nonfinite == SKIPPED or adapts, norms=adapts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; also between steps."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_keys(group, len(self.param_groups) - 1, self)
            check_group(group, VARIANTS[self.variant].bits)
            for index, param in enumerate(group["params"]):
                name = name_of(group, len(self.param_groups) - 1, index)
                check_new_param(param, name, self.stochastic_rounding is True)
        except Exception:
            self.param_groups.pop()
            raise
        if self._release is not None:
            self._release.watch([group])

    # In a compiled training step this is a graph break. Compiled piece by piece, as it would be otherwise,
    # the arithmetic would round differently, and pages and launches would be traced.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients.

        Everything is checked before anything is written, and an interrupt waits until all is written.
        ``grad_scale`` and ``found_inf``, if a gradient scaler has set them on the optimizer, are
        honoured.

        The first step of ``variant="auto"`` decides, together with those ranks of torch.distributed's default
        process group that step an optimizer of the same parameters; it waits ten seconds at most, and
        who comes later follows. Where others did not come, the next optimizer waits a quarter as long. A step
        without gradients is not the first yet, nor, with any variant, is one of gradients and learning rates
        of zero where there is no state, as torch.distributed.checkpoint takes it: it is not counted.

        Raises:
            RuntimeError: a step before failed halfway and left parameters inconsistent; or a CUDA graph is
                being captured, and this optimizer or this step cannot be.
            RuntimeError, TypeError, ValueError: a parameter or its gradient cannot be stepped, for its dtype,
                its layout, or memory that it shares with another.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        check_capture(self.capturable, found_inf)
        if self.gradient_release:
            self.__dict__.pop("found_inf", None)  # or a later step without a scaler would be refused, too
            self.__dict__.pop("grad_scale", None)
        check_unscaled(self.gradient_release, found_inf, scale)
        if found_inf is not None and float(found_inf) != 0:
            return loss
        self._whole.check()
        self._chooser.watch()
        if self._release is not None:
            self._release.close(self.param_groups)
        else:
            with lasting(), self._store.hold():
                self._clipping.begin()
                self._update(scale)
        self._statistics.finish(self.param_groups)
        return loss

    def accumulating(self) -> AbstractContextManager[None]:
        """Around every backward but the last before a step, with ``gradient_release``: their gradients are
        added up, where ``accumulate_on`` says, and none is used yet. Without, it does nothing."""
        return nullcontext() if self._release is None else self._release.accumulating()

    def abandon_step(self) -> int:
        """With ``gradient_release``, after a backward that failed: go on with some parameters a step ahead of
        the others, whose gradients and sums are dropped. How many they are."""
        self._statistics.drop()
        return 0 if self._release is None else self._release.abandon(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; and what has been added up on the host is dropped."""
        super().zero_grad(set_to_none)
        if self._release is not None:
            self._release.drop_sums()

    def _name_of(self, param: Tensor) -> str:
        return next((name for each, name in named(self.param_groups) if each is param), "a parameter")

    def _released(self, params: Sequence[Tensor], first: bool, following: Sequence[Tensor]) -> None:
        """Update these parameters, while backward runs or at its end. ``first``: of this step;
        ``following``: the next ones, most likely."""
        with lasting(), self._store.hold():
            if first:
                self._whole.check()
                self._clipping.begin()
                self._store.forget()
            if self._places.sums is not None:
                self._places.sums.take(params, self._whole.commit, following)
            self._update(None, set(map(id, params)))
            self._places.fetch(set(map(id, following)))

    def _join(self, wait: bool) -> None:
        """At the end of a backward, whose stream goes on with the weights; where that has failed, the host
        waits until nothing is under way."""
        sums = self._places.sums
        if wait:
            self._store.finish()
        self._store.join()
        if sums is not None:
            sums.join()

    def _added(self, params: Sequence[Tensor], following: Sequence[Tensor]) -> None:
        """Add the gradients of these to their sums on the host."""
        sums = self._places.sums
        if sums is not None:
            with lasting(), self._store.hold():
                self._whole.check()
                sums.add(params, self.param_groups, following)

    def _update(self, scale: float | Tensor | None, among: Collection[int] | None = None) -> None:
        """Update the parameters that have gradients, or those of them that have these ids."""
        for group in self.param_groups:
            check_group(group, VARIANTS[self.variant].bits, self._scalars.on_device)
        stepped = Stepped.of(self.param_groups, among)
        batch = self._places.batch_of(stepped, self.state)
        if batch is None:
            return
        self._store.reload(self.state)
        ordered = batch.in_order(stepped)
        judged = self._judge(batch, ordered, scale, stepped) if self._clipping.active else None
        left = batch.left() if self._statistics.wanted else None
        stop = never if judged is None or left is not None else judged.known_skipped
        if stop():
            return
        work = batch.prepare(ordered, Settings(self.param_groups, scale), judged, left)
        self._store.prepare(work)
        with self._whole.commit(in_graph=tables.capturing()):
            self._store.attach(batch.slots, self.state)
            if changed := batch.changed():
                self._store.finish()  # or a page on its way would arrive over it
                begin_anew(changed)
            self._store.run(work, stop, (ordered, stepped.grads, judged))
            batch.count(judged)
            if batch.copies:
                self._store.join({slot.buffer.device for slot in batch.slots})
                batch.copy_back(ordered, stepped)
            batch.remember()
            self._store.saw_weights()
            if left is not None:
                self._statistics.add(left)

    def _judge(
        self, batch: Batch, ordered: Tensors, scale: float | Tensor | None, stepped: Stepped
    ) -> Judged:
        def faults() -> list[str]:
            found = [each for each in map(describe, stepped.grads, stepped.names) if each]
            return found or [ELSEWHERE] * any_shard(stepped.owners)

        return self._clipping.judge(batch.norms(ordered), scale, faults)

    def offload(self) -> None:
        """Hand back the GPU memory of resident state and of staging between steps, for evaluation or
        generation. State waits in host memory; the next ``step()`` takes it back by itself.

        Raises:
            MemoryError: the host's memory is too small; nothing is changed then.
            RuntimeError: the optimizer is capturable: graphs would go on using the state's old place.
        """
        check_movable(self.capturable)
        self._whole.check()
        self._places.offload(self.param_groups, self.state)

    def reload(self) -> None:
        """Take state back to where it was before ``offload()``."""
        self._whole.check()
        self._places.settle(self.param_groups, self.state)
        self._store.reload(self.state)

    def memory(self) -> dict[str, int]:
        """Bytes of state by place ("gpu", "host"), of staging buffers on the GPU ("staging"), and of
        state by format ("32bit", "8bit"), what goes with exact weights apart ("weights"). Empty of state
        before the first step. With ``accumulate_on="host"`` also of the sums ("sums"), which are part of
        "host", as their staging buffers are of "staging"."""
        return self._places.memory()

    @torch.no_grad()
    @lasting()
    def master_weight(self, param: Tensor) -> Tensor:
        """A parameter's exact weight: a new fp32 tensor of its shape, on its device. Of one that is not kept
        exactly, what it is.

        Raises:
            ValueError: the optimizer does not have this parameter.
        """
        return self._masters().weight(param)

    @torch.no_grad()
    @lasting()
    def master_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """``model.state_dict()`` in host memory, with exact weights, in fp32, in place of the parameters that
        have them. Everything else is as it is.

        Raises:
            ValueError: the optimizer has no parameter of this model.
        """
        return self._masters().state_dict(model)

    @torch.no_grad()
    @lasting()
    def load_master_state_dict(self, model: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
        """The way back: load all weights of the model, and of those that are kept exactly also what their 16
        bits lack. Moments and step counts stay as they are. Before the first step, too.

        Args:
            state_dict: of ``master_state_dict``, or anybody's of this model, in any floating dtype. Of tied
                weights one name is enough.

        Raises:
            ValueError: what is missing, unknown or wrong; nothing is changed then.
            MemoryError, torch.OutOfMemoryError: there is no memory for the state; nothing is changed then.
        """
        masters = self._masters()
        incoming = masters.check(model, state_dict)
        with self._store.hold():
            self._places.keep(incoming.exact, self.param_groups, self.state)
            with self._whole.commit():
                masters.load(incoming, self._store.slots)

    def _check_whole(self) -> None:
        """Before state or weights are given away: they are of one step."""
        self._whole.check()
        if self._release is not None:
            self._release.check()

    def _masters(self) -> checkpoint.Masters:
        self._check_whole()
        self._store.renew(self.state)
        exact = {id(each.param) for each in self._places.exact(self.param_groups, self.state)}
        return checkpoint.Masters(self.param_groups, self.state, exact)

    def state_dict(self, *, state_format: StateFormat | None = None) -> dict[str, Any]:
        """As torch's. Call it between steps. What others keep in ``state`` is part of it, as it is.

        Args:
            state_format: ``"native"`` for the state as it is, exactly: 32-bit state under
                torch.optim.AdamW's names, 8-bit state as codes and scales, all of them views of the live
                state. ``"portable"`` for fp32 under torch.optim.AdamW's names, which any AdamW loads; 8-bit
                state is decoded for it into host memory, 8 bytes an element. None for the native form, but
                the portable one of parameters that FSDP (version 1) has flattened: its ``optim_state_dict``
                cannot gather codes.

        Raises:
            RuntimeError: a step, or with ``gradient_release`` a backward, failed halfway and left parameters
                inconsistent.
        """
        writer = checkpoint.Writer(state_format, self._store.slots)
        self._check_whole()
        self._store.renew(self.state)
        writing = self.register_state_dict_post_hook(writer, prepend=True)  # before the user's own
        try:
            return super().state_dict()
        finally:
            writing.remove()

    @lasting()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of ours, of any variant and form, of torch.optim.AdamW or Adam, of bitsandbytes'
        AdamW (32-bit and 8-bit), or of torchao's AdamW8bit. It is converted to this optimizer's variant; for
        8 bits, v that half precision has rounded is raised to (m/bound)**2, since no AdamW can have it lower:
        bound = (1-b1) / sqrt((1-b2)*(1-b1**2/b2)). What others keep in the state comes along.

        Raises:
            ValueError: what is wrong with which parameter or group; nothing is changed then.
            MemoryError, torch.OutOfMemoryError: memory is too small; nothing is changed then.
        """
        if not isinstance(state_dict, dict):  # torch copies it before any hook
            checkpoint.check_form(state_dict)
            state_dict = dict(state_dict)
        before, slots = (self.state, self.param_groups), self._store.slots
        reader = checkpoint.Reader(
            lambda group: check_group({**torch_defaults(), **group}, VARIANTS[self.variant].bits)
        )
        reading = self.register_load_state_dict_pre_hook(reader)  # behind the user's own
        try:
            with self._store.hold():
                super().load_state_dict(state_dict)
                if self._chooser.decided:
                    with DeferredInterrupt(), torch.no_grad():
                        self._places.reserve(self.param_groups, self.state, stateful_only=not slots)
        except BaseException as error:
            self.state, self.param_groups = before
            if not slots:
                self._reset()
            elif self._store.disturbed:  # copies over the old state failed, as after an error of the GPU
                self._whole.fail(error)
            raise
        finally:
            reading.remove()
        self._whole = WholeSteps()
        self._statistics.go_on_from(self.state)
        if self._release is not None:
            # Gradients of a backward that failed are none of the next.
            self._release.abandon(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": checkpoint.unbox(state["state"])})
        if "_places" not in self.__dict__:  # unpickled
            self._reset()
            self._statistics.go_on_from(self.state)
        for group in self.param_groups:
            for key, value in torch_defaults().items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        # Buffers and tables are rebuilt from ``state`` at the next step.
        self._check_whole()
        self._store.renew(self.state)
        state = checkpoint.cut(self.state, self._store.slots)
        kept = {name: getattr(self, name) for name in (*_DECIDED, "_chooser")}
        return {**super().__getstate__(), "state": state, **kept}

    def _reset(self) -> None:
        # What was spilled before a load stays so; an unpickled optimizer has no store yet.
        policy = self._store.policy if "_places" in self.__dict__ else self._chooser.policy
        transfer = COPY if self.gradient_release and self.transfer == "auto" else self.transfer
        self._places = Reservations(
            self._chooser, policy, transfer, self.block_size, scalars=self._scalars,
            kept_batches=KEPT_BUCKETS if self.gradient_release else KEPT_BATCHES,
            beside=self.gradient_release, summing=self._summing,
        )  # fmt: skip
        self._clipping = Clipping(
            self.max_grad_norm, self.adaptive_clip, self.nonfinite, whole=not self.gradient_release
        )
        self._statistics = Statistics(int(self.telemetry))
        self._chooser.attach(self._store.on_gpu, self._spill, self._unspill)
        self._whole = WholeSteps()
        if self.gradient_release:
            sums = self._places.sums
            adding = None if sums is None else Adding(self._added, sums.held)
            self._release = Release(self._released, self._join, self._name_of, adding)
            self._release.watch(self.__dict__.get("param_groups", ()))
            self._step_supports_amp_scaling = True  # so that a gradient scaler shows itself, to be refused

    def _spill(self, device: torch.device, nbytes: int) -> int:
        """Take so many bytes of state off a GPU; how many it were. If backward runs out of memory, its thread
        calls this while the user's waits for it."""
        with torch.no_grad():
            moved = self._places.spill(device, nbytes, self.param_groups, self.state)
        self._spills += moved > 0
        return moved

    def _unspill(self, device: torch.device, room: int) -> int:
        """Take some of it back, if that needs no more than ``room`` bytes; how many it were."""
        with torch.no_grad():
            return self._places.unspill(device, room, self.param_groups, self.state)
