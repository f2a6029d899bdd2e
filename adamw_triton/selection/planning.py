"""``plan()``: which variant fits a model on a GPU, before any training, also on a machine without one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adamw_triton.arguments import BLOCK_SIZES, check_accumulation, check_choice, check_weights
from adamw_triton.choices import AccumulateOn, Auto, Prefer, Sharding
from adamw_triton.memory import gpu
from adamw_triton.memory.host import host_limit
from adamw_triton.memory.units import format_bytes, parse_bytes
from adamw_triton.selection import overlap, rates
from adamw_triton.selection.cards import find_card, parse_gpu
from adamw_triton.selection.plans import Candidate, Limits, Plan, format_seconds
from adamw_triton.selection.selector import Demand, Trained, select
from adamw_triton.selection.share import Share
from adamw_triton.state.formats import as_real
from adamw_triton.state.placement import SumBytes, live_bytes, sum_bytes
from adamw_triton.tensors import DTYPES

CONTEXT = 500 << 20
"""Bytes that CUDA and its libraries take for themselves before the first tensor, on a card that is not here.
Estimated: it differs by driver and by which libraries are loaded."""

_NO_ACTIVATIONS = "Activations are not counted: say how many bytes they take (activations=, --activations)."


class Card(NamedTuple):
    """The GPU that a plan is for."""

    name: str
    memory: int
    """Bytes in all."""
    context: int
    """Of them taken before the first tensor."""
    rates: rates.Rates


def plan(
    model_or_params: nn.Module | Iterable[Any],
    gpu_memory: int | str | None = None,
    host_memory: int | str | None = None,
    *,
    grad_dtype: torch.dtype | None = None,
    activations: int | str | None = None,
    prefer: Prefer = "speed",
    block_size: int = 128,
    master_weights: bool | Auto = "auto",
    stochastic_rounding: bool | Auto = "auto",
    gradient_release: bool = False,
    accumulation: int = 1,
    accumulate_on: AccumulateOn = "gpu",
    accumulate_dtype: torch.dtype | None = None,
    tokens: int | None = None,
    checkpointing: bool = True,
    ranks: int = 1,
    sharding: Sharding = "full",
) -> Plan:
    """Which variant fits, and why the others do not.

    Args:
        model_or_params: a module, or what an optimizer takes: parameters, named ones, or groups. They may be
            on the meta device. Those that require gradients are trained; of the others the bytes count.
        gpu_memory: of one GPU: bytes, text like ``"24GiB"``, or a card's name like ``"T4"`` or ``"3090"``.
            None: the current GPU, of which what other processes take is gone.
        host_memory: bytes or text that paged state may take. None: what this machine has available.
        grad_dtype: of the gradients. None: each parameter's own.
        activations: bytes or text that forward and backward take at their peak, beside weights, gradients
            and state. None: not counted, and the plan says so.
        prefer: ``"speed"`` goes to 8 bits before it pages, ``"exact"`` pages before it goes to 8 bits.
        block_size: of the 8-bit format, as in ``AdamW``.
        master_weights, stochastic_rounding: as in ``AdamW`` with ``variant="auto"``.
        gradient_release: as in ``AdamW``.
        accumulation: backwards before a step. Of several, gradients are all there, with ``gradient_release``
            or without, unless they add up on the host.
        accumulate_on, accumulate_dtype: as in ``AdamW``.
        tokens: of one backward, of a model that takes each through all its weights. The plan then says how
            long forward and backward take, and how much of the step they hide. None: it does not.
        checkpointing: whether backward computes activations again, which hides more.
        ranks: GPUs of one machine, which train together and share the host's memory. The plan is of one.
        sharding: of several ``ranks``, ``"full"``, as FSDP2's ``fully_shard`` of each layer and of the model,
            whose layers names tell, or ``"none"``, as DDP.

    Raises:
        ValueError: an argument is out of range, a card is unknown, or ``gpu_memory`` is None without a GPU.
        TypeError: a trained parameter's dtype is not supported.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"Invalid block_size: {block_size!r}; it must be 128 or 256")
    if not (grad_dtype is None or isinstance(grad_dtype, torch.dtype)):
        raise TypeError(f"grad_dtype must be a torch.dtype or None, not {grad_dtype!r:.60}")
    check_choice("gradient_release", gradient_release)
    check_choice("checkpointing", checkpointing)
    for name, value in (
        ("accumulation", accumulation),
        ("tokens", 1 if tokens is None else tokens),
        ("ranks", ranks),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Invalid {name}: {value!r}; it must be a whole number >= 1")
    check_accumulation(accumulate_on, accumulate_dtype, gradient_release)
    share = Share(ranks, sharding)
    share.check(gradient_release)
    tensors = list(_counted(model_or_params))
    if not tensors:
        raise ValueError("model_or_params has no parameters to plan for")
    trained = [
        share.trained(_trained(tensor, group, grad_dtype), tensor)
        for _, tensor, group in tensors
        if tensor.requires_grad
    ]
    weights = sum(share.of(tensor.nbytes) for _, tensor, _ in tensors)
    each = [tensor.numel * tensor.grad_itemsize for tensor in trained]
    on_host = accumulation > 1 and accumulate_on == "host"
    are_few = gradient_release and (accumulation == 1 or on_host)
    gradients = live_bytes(each) if are_few else sum(each)
    sums = SumBytes()
    if on_host:
        sums = sum_bytes(
            (accumulate_dtype or grad_dtype or tensor.dtype.to_real(), as_real(tensor).numel())
            for _, tensor, _ in tensors
            if tensor.requires_grad
        )
    here = sum(tensor.nbytes for _, tensor, _ in tensors if tensor.is_cuda)
    card = _card(gpu_memory, here)
    peak = 0 if activations is None else parse_bytes(activations, "activations")
    slack = int(gpu.SLACK_SHARE * card.memory)
    spent = (
        ("memory", card.memory),
        ("driver and other processes", card.context),
        ("weights", weights),
        ("gradients at one time" if are_few else "gradients", gradients),
        *share.spent((name, tensor) for name, tensor, _ in tensors),
        ("activations", peak),
        ("slack", slack),
    )
    room = card.memory - sum(count for _, count in spent[1:])
    found = select(
        [Demand(Limits(card.name, room, *card.rates, spent=spent), trained, sums, accumulation)],
        _host_room(host_memory) // ranks,
        prefer=prefer,
        block_size=block_size,
        weights=check_weights("auto", master_weights, stochastic_rounding),
        notes=(
            *((_of_sums(sums.host, accumulation, card),) if on_host else ()),
            *(() if activations is not None else (_NO_ACTIVATIONS,)),
            *share.notes(),
        ),
    )
    if tokens is None or found.chosen is None:
        return found
    run = overlap.Run(tokens, accumulation, checkpointing, gradient_release, sums.host)
    return replace(found, notes=(*found.notes, _of_time(found.chosen, [t for _, t, _ in tensors], run, card)))


def _of_time(chosen: Candidate, tensors: Sequence[Tensor], run: overlap.Run, card: Card) -> str:
    try:
        known = find_card(card.name)
    except ValueError:
        return f"How long forward and backward take on {card.name} is not known: name the card."
    return overlap.describe(chosen, tensors, run, known)


def _of_sums(nbytes: int, accumulation: int, card: Card) -> str:
    seconds = format_seconds(accumulation * nbytes / card.rates.link)
    return (
        f"Gradients of {accumulation} micro-batches add up in host memory: {format_bytes(nbytes)} of what is "
        f"there; moving them is {seconds} of the step, most of it beside forward and backward."
    )


_Named = Iterator[tuple[str, Tensor, Mapping[str, Any]]]


def _tensors(model_or_params: nn.Module | Iterable[Any]) -> _Named:
    """Each tensor with its name, if it has one, and its group; of a module its buffers too."""
    if isinstance(model_or_params, nn.Module):
        named = (*model_or_params.named_parameters(), *model_or_params.named_buffers())
        yield from ((name, tensor, {}) for name, tensor in named)
        return
    if isinstance(model_or_params, Tensor | str) or not isinstance(model_or_params, Iterable):
        what = "one tensor" if isinstance(model_or_params, Tensor) else f"{model_or_params!r:.60}"
        raise TypeError(
            f"model_or_params must be a module or an iterable of parameters, not {what}; a number of "
            "parameters is planned for by `adamw-triton plan --params 1.5B`"
        )
    for item in model_or_params:
        group = item if isinstance(item, Mapping) else {}
        if isinstance(item, Mapping) and "params" not in item:
            raise ValueError(f"model_or_params has a group without 'params'; it has {list(item)!r:.60}")
        members = item["params"] if isinstance(item, Mapping) else [item]
        alone = isinstance(members, Tensor) or not isinstance(members, Iterable)
        for member in [members] if alone else members:
            name, tensor = member if isinstance(member, tuple) and len(member) == 2 else ("", member)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"model_or_params has a {type(tensor).__name__} where a tensor should be")
            yield str(name), tensor, group


def _counted(model_or_params: nn.Module | Iterable[Any]) -> _Named:
    """Each tensor once, of which the size is known."""
    seen = set()
    for name, tensor, group in _tensors(model_or_params):
        if is_lazy(tensor):
            raise ValueError(
                "model_or_params has a parameter of a lazy module, whose shape is not known yet: run a "
                "forward pass first"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"model_or_params has a parameter of layout {tensor.layout}; only dense ones count"
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor, group


def _trained(tensor: Tensor, group: Mapping[str, Any], grad_dtype: torch.dtype | None) -> Trained:
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"a parameter that requires gradients has dtype {tensor.dtype}; AdamW cannot train it"
        )
    found = Trained.of(tensor, group)
    return found if grad_dtype is None else found._replace(grad_itemsize=grad_dtype.itemsize)


def _card(gpu_memory: int | str | None, here: int) -> Card:
    """``here``: bytes of the model that are on this machine's GPU already."""
    if gpu_memory is None:
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU here: say for which one (gpu_memory='T4', or '24GiB')")
        device = torch.device("cuda", torch.cuda.current_device())
        now = gpu.CudaAllocator(device)
        snapshot = now.snapshot()
        ours = snapshot.total - (snapshot.available - torch.cuda.memory_allocated(device) + here)
        return Card(now.name, snapshot.total, ours, rates.measured(device))
    found = parse_gpu(gpu_memory, "gpu_memory")
    if isinstance(found, int):
        return Card("a GPU", found, CONTEXT, rates.UNKNOWN)
    return Card(found.name, found.memory, CONTEXT, rates.named(found.name))


def _host_room(host_memory: int | str | None) -> int:
    if host_memory is not None:
        return parse_bytes(host_memory, "host_memory")
    limit = host_limit()
    if limit is None:
        raise ValueError("this system does not say how much memory it has: give host_memory")
    return limit.available
