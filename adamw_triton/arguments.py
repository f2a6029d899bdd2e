"""Checks of what users pass in: each refusal names the argument, what it was and what is allowed."""

from __future__ import annotations

import difflib
import functools
import math
import warnings
from collections.abc import Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW as TorchAdamW  # now: somebody may put ours in its place

from adamw_triton.choices import ACCUMULATE_ON, NONFINITE, PREFERENCES, TRANSFERS, check_word
from adamw_triton.memory.units import format_bytes, parse_bytes
from adamw_triton.state.placement import SMALLEST_BUDGET, check_budget
from adamw_triton_kernels import tables


class Variant(NamedTuple):
    """What a ``variant=`` stands for."""

    bits: int
    paged: bool = False
    chosen: bool = False
    """Whether the first step chooses other ones."""


VARIANTS = {
    "auto": Variant(32, chosen=True),
    "32bit": Variant(32),
    "8bit": Variant(8),
    "paged_32bit": Variant(32, paged=True),
    "paged_8bit": Variant(8, paged=True),
}
BLOCK_SIZES = (128, 256)
_OF_A_GROUP = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "state_bits")
OF_THE_OPTIMIZER = (
    "variant", "memory_budget", "prefer", "transfer", "block_size", "master_weights", "stochastic_rounding",
    "max_grad_norm", "adaptive_clip", "nonfinite", "gradient_release", "accumulate_on", "accumulate_dtype",
    "telemetry",
)  # fmt: skip
_OF_ALL_GRADIENTS = ("max_grad_norm", "nonfinite")


@functools.cache
def torch_defaults() -> Mapping[str, Any]:
    """What the groups of this torch's AdamW hold. Ours hold as much and no more, unless somebody sets it:
    torch.distributed.checkpoint goes by the keys of who loads, and both shall load each other's."""
    return MappingProxyType(TorchAdamW([torch.zeros(1, device="cpu")]).defaults)


def check_variant(variant: object, block_size: object, capturable: bool) -> Variant:
    check_word("variant", variant, tuple(VARIANTS))
    check_switch("capturable", capturable)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"Invalid block_size: {block_size!r}; it must be 128 or 256")
    found = VARIANTS[str(variant)]
    if capturable and found.paged:
        raise ValueError(
            f"capturable=True needs state that stays in one place, and variant={variant!r} streams it; "
            "use 'auto', '32bit' or '8bit'"
        )
    return found


def check_telemetry(telemetry: object) -> int:
    """Of so many steps one is looked at; 0: none."""
    if isinstance(telemetry, bool):
        return int(telemetry)
    if not isinstance(telemetry, int) or telemetry < 1:
        raise ValueError(
            f"Invalid telemetry: {telemetry!r}; it must be False, True for every step, or a whole number N "
            "from 1 on for every N-th"
        )
    return telemetry


def check_prefer(prefer: object, variant: str) -> None:
    check_word("prefer", prefer, PREFERENCES)
    if prefer != PREFERENCES[0] and not VARIANTS[variant].chosen:
        raise ValueError(f"prefer={prefer!r} needs variant='auto': variant={variant!r} leaves no choice")


def check_implementation(fused: object, foreach: object, differentiable: object) -> None:
    """torch.optim.AdamW's choice among its implementations; the one that is here is all of them at once."""
    for name, value in (("fused", fused), ("foreach", foreach)):
        if value not in (None, False, True):
            raise ValueError(f"Invalid {name}: {value!r}; it must be None, False or True")
    if differentiable:
        raise ValueError(
            "differentiable=True needs a step that autograd can follow, and this one writes into memory by "
            "kernels of its own: use torch.optim.AdamW"
        )


def check_weights(variant: str, master_weights: object, stochastic_rounding: object) -> tuple[str, ...]:
    """How weights of 16 bits may be kept (``formats.WEIGHTS``), the best first."""
    for name, value in (("master_weights", master_weights), ("stochastic_rounding", stochastic_rounding)):
        if not (isinstance(value, bool) or (isinstance(value, str) and value == "auto")):
            raise ValueError(f"Invalid {name}: {value!r}; it must be 'auto', True or False")
    if master_weights is True and stochastic_rounding is True:
        raise ValueError(
            "master_weights=True and stochastic_rounding=True contradict each other: exact weights lose "
            "nothing, so there is nothing to round stochastically"
        )
    if master_weights is True:
        return ("exact",)
    if stochastic_rounding is True:
        return ("stochastic",)
    if not VARIANTS[variant].chosen:
        return ("nearest",)
    exact = ("exact",) if master_weights == "auto" else ()
    return (*exact, "nearest" if stochastic_rounding is False else "stochastic")


def check_clipping(max_grad_norm: Any, adaptive_clip: Any, nonfinite: object, capturable: bool) -> None:
    most, factor = as_number(max_grad_norm), as_number(adaptive_clip)
    if max_grad_norm is not None and (most is None or not most > 0):
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm!r}; it must be a number > 0, or None: no clipping"
        )
    if adaptive_clip is not None and (factor is None or not 1 <= factor < math.inf):
        raise ValueError(
            f"Invalid adaptive_clip: {adaptive_clip!r}; it must be a finite number >= 1 (below, each step "
            "would shrink the average it is measured by), or None: no clipping"
        )
    check_word("nonfinite", nonfinite, NONFINITE)
    if capturable and nonfinite == "raise":
        raise ValueError(
            "nonfinite='raise' has the host look at the gradients, which it cannot at the replays of a CUDA "
            "graph: with capturable=True use nonfinite='skip'"
        )


def check_choice(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}: {value!r}; it must be True or False")


def check_release(gradient_release: object, max_grad_norm: float | None, capturable: bool) -> None:
    check_choice("gradient_release", gradient_release)
    if gradient_release and max_grad_norm is not None and max_grad_norm < math.inf:
        raise ValueError(
            f"max_grad_norm={max_grad_norm} needs the norm of all gradients before any is used up, as "
            "gradient_release=True does with each as it comes: clip each by itself, adaptive_clip=1.05, or "
            "see the norm alone, max_grad_norm=math.inf"
        )
    if gradient_release and capturable:
        raise ValueError(
            "gradient_release=True and capturable=True exclude each other: what is released is stepped by "
            "autograd, which a CUDA graph does not call"
        )


def check_accumulation(
    accumulate_on: object, accumulate_dtype: object, gradient_release: bool, budget: int | None = None
) -> None:
    """``budget``: bytes of ``memory_budget``."""
    check_word("accumulate_on", accumulate_on, ACCUMULATE_ON)
    if accumulate_dtype not in (None, torch.float32):
        raise ValueError(
            f"Invalid accumulate_dtype: {accumulate_dtype!r}; it must be None, for sums in the gradients' "
            "own dtype, or torch.float32"
        )
    if accumulate_on == "host" and not gradient_release:
        raise ValueError(
            "accumulate_on='host' needs gradient_release=True: without it step() finds the gradients of the "
            "last backward where autograd left them, and all of these are there at once anyway"
        )
    if accumulate_dtype is not None and accumulate_on != "host":
        raise ValueError(
            f"accumulate_dtype={accumulate_dtype} needs accumulate_on='host': on the GPU it is autograd that "
            "adds gradients up, in their own dtype"
        )
    if accumulate_on == "host" and budget is not None and budget < 2 * SMALLEST_BUDGET:
        raise ValueError(
            f"memory_budget of {format_bytes(budget)} is too small: pages of state and, with "
            f"accumulate_on='host', of sums need {format_bytes(SMALLEST_BUDGET)} each, "
            f"{format_bytes(2 * SMALLEST_BUDGET)} in all"
        )


def check_unscaled(released: bool, found_inf: Tensor | None, scale: float | Tensor | None) -> None:
    """Of a step that a gradient scaler takes."""
    if released and (found_inf is not None or scale is not None):
        raise RuntimeError(
            "a gradient scaler came with its scale when gradient_release=True had used up the scaled "
            "gradients, in steps that were too large by it: load a checkpoint of the model and of the "
            "optimizer, and train in bf16, which needs no scaler, or with gradient_release=False"
        )


def as_number(value: object) -> float | None:
    """None if it is none, or one that no float can hold. numpy's are numbers too, truth values are not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def check_paging(variant: str, memory_budget: object, transfer: object) -> int | None:
    """The budget in bytes; None for none."""
    check_word("transfer", transfer, TRANSFERS)
    pages = VARIANTS[variant].paged or VARIANTS[variant].chosen
    for name, value, default in (("memory_budget", memory_budget, None), ("transfer", transfer, "auto")):
        if value != default and not pages:
            raise ValueError(
                f"{name}={value!r} needs variant='auto' or a paged one; variant={variant!r} keeps all state "
                "where its parameters are"
            )
    if memory_budget is None:
        return None
    budget = parse_bytes(memory_budget, "memory_budget")
    check_budget(budget)
    return budget


def check_group(group: dict[str, Any], default_bits: int, capturable: bool = False) -> None:
    """The hyperparameters of a parameter group; messages begin as torch.optim.AdamW's do. With ``capturable``
    those on a GPU are not read: that would wait for it."""
    check_implementation(*(group.get(key) for key in ("fused", "foreach", "differentiable")))
    try:
        _check_hyperparameters(group, default_bits, capturable)
    except (TypeError, RuntimeError) as error:  # of whatever cannot be compared with numbers
        given = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        wrong = {key: value for key, value in given.items() if not _is_numeric(value, key == "betas")}
        said = ", ".join(f"{key}={value!r:.60}" for key, value in (wrong or given).items())
        raise TypeError(f"hyperparameters must be numbers (betas two), got {said}") from error


def _is_numeric(value: object, is_pair: bool) -> bool:
    if not is_pair:
        return value.numel() == 1 if isinstance(value, Tensor) else as_number(value) is not None
    return isinstance(value, tuple | list) and all(_is_numeric(each, False) for each in value)


def check_switch(name: str, value: object) -> None:
    """Of 0 and 1, too, which some formats make of truth values; not of text, of which all is true, or of a
    number that was meant for another argument."""
    check_choice(name, bool(value) if isinstance(value, int) and value in (0, 1) else value)


def _check_hyperparameters(group: dict[str, Any], default_bits: int, capturable: bool) -> None:
    for switch in ("amsgrad", "maximize"):
        check_switch(switch, group.get(switch, False))
    lr, betas, eps, weight_decay = (group[key] for key in ("lr", "betas", "eps", "weight_decay"))
    for key, value in (("lr", lr), *((f"betas[{i}]", beta) for i, beta in enumerate(betas))):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element, got shape {tuple(value.shape)}")
    if len(betas) != 2 or isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}")
    unread = [capturable and isinstance(value, Tensor) and value.is_cuda for value in (lr, *betas)]
    if not (unread[0] or 0 <= lr < math.inf):
        raise ValueError(f"Invalid learning rate: {lr}; lr must be a finite number >= 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"Invalid epsilon value: {eps}; eps must be a finite number >= 0")
    for index, beta in enumerate(betas):
        if not (unread[1 + index] or 0 <= beta < 1):
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; it must be in [0, 1)")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; it must be a finite number >= 0")
    state_bits = group.get("state_bits")  # not in a group that was made for another AdamW
    if state_bits not in (None, 8, 32):
        raise ValueError(f"Invalid state_bits: {state_bits!r}; it must be 8, 32 or None")
    if group["amsgrad"] and (state_bits or default_bits) == 8:
        raise ValueError(
            "amsgrad=True needs 32-bit state: the 8-bit format keeps no maximum; "
            "use variant='32bit', or state_bits=32 for the group"
        )


def check_keys(group: Mapping[str, Any], group_index: int, optimizer: object) -> None:
    """What a new group sets. Frameworks keep keys of their own there, so unknown ones are left alone; but for
    those of which somebody expects an effect.

    Args:
        optimizer: has its own arguments as attributes. ZeroRedundancyOptimizer repeats them in every group.

    Raises:
        ValueError: a key is an argument of the whole optimizer, which was given another.
    """
    for key in group:
        if key in OF_THE_OPTIMIZER:
            says = f"group {group_index} sets {key}={group[key]!r}, which is of the whole optimizer"
            if group[key] != getattr(optimizer, key):
                raise ValueError(f"{says}: pass it to AdamW; a group may set state_bits (8 or 32)")
            if key in _OF_ALL_GRADIENTS and group[key] not in (None, NONFINITE[0]):
                raise ValueError(
                    f"{says}. Under ZeroRedundancyOptimizer it cannot be given at all, for each rank would "
                    "go by the gradients of its own parameters alone: call torch.nn.utils.clip_grad_norm_ "
                    "before step(), with error_if_nonfinite=True if need be"
                )
        if meant := _meant_by(str(key)):
            warnings.warn(
                f"group {group_index} has a key {key!r}, which changes nothing: was {meant!r} meant?",
                stacklevel=3,
            )


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


_CALLED = {_plain(key): key for key in _OF_A_GROUP} | {
    "optimbits": "state_bits", "bits": "state_bits", "learningrate": "lr", "wd": "weight_decay",
}  # fmt: skip
"""Keys of groups, by what they are called here and in other optimizers."""


def _meant_by(key: str) -> str | None:
    """A key of groups that this one nearly is."""
    if key in _OF_A_GROUP:
        return None
    close = difflib.get_close_matches(_plain(key), _CALLED, n=1, cutoff=0.85)
    return _CALLED[close[0]] if close else None


def check_capture(capturable: bool, found_inf: Tensor | None) -> None:
    """Whether a step that goes into a CUDA graph would be right at its replays."""
    if not tables.capturing():
        return
    if not capturable:
        raise RuntimeError(
            "step() is being captured in a CUDA graph, which would repeat the numbers of this step at each "
            "replay: make the optimizer with capturable=True"
        )
    if found_inf is not None:
        raise RuntimeError(
            "step() cannot be captured in a CUDA graph while found_inf is set, which the host has to read to "
            "skip a step: train in bf16, which needs no gradient scaler"
        )


def check_movable(capturable: bool) -> None:
    if capturable:
        raise RuntimeError("offload() moves state, and CUDA graphs know its place: make capturable=False")
