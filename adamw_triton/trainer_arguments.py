"""From Hugging Face's training arguments to ``(AdamW, its arguments)``: what a ``Trainer`` builds its
optimizer from. Knows the names of those arguments, and never imports transformers."""

from __future__ import annotations

import math
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from adamw_triton.arguments import VARIANTS
from adamw_triton.optimizer import AdamW

OPTIMIZERS = {
    "adamw_triton": "auto",
    "adamw_triton_32bit": "32bit",
    "adamw_triton_8bit": "8bit",
    "paged_adamw_triton_32bit": "paged_32bit",
    "paged_adamw_triton_8bit": "paged_8bit",
}
"""What ``optim=`` may say, and the variant it stands for."""

_SET_ELSEWHERE = {
    "params": "the Trainer passes them",
    "lr": "set learning_rate",
    "betas": "set adam_beta1 and adam_beta2",
    "eps": "set adam_epsilon",
    "weight_decay": "set weight_decay of the training arguments, which spares biases and norms",
    "variant": f"choose it by optim=, one of {', '.join(OPTIMIZERS)}",
}
"""Arguments of AdamW that ``optim_args`` may not set, and what to do instead."""


def optimizer_cls_and_kwargs(
    args: Any, variant: str | None = None, **settings: Any
) -> tuple[type[AdamW], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

    Args:
        args: ``TrainingArguments``, or anything with its ``learning_rate``, ``adam_beta1``,
            ``adam_beta2``, ``adam_epsilon`` and perhaps ``optim`` and ``optim_args``.
        variant: of AdamW; None: the one that ``args.optim`` stands for.
        settings: further arguments of AdamW, over those of ``args.optim_args``.

    ``args.optim_args`` is text like ``"memory_budget=4GiB,block_size=256"``, or a mapping. Weight
    decay is not among the results: a Trainer gives it to the parameter groups.

    Raises:
        ValueError: ``optim``, or a key or value of ``optim_args``, is not one of ours.
    """
    optim = getattr(args, "optim", None)
    ours = OPTIMIZERS.get(getattr(optim, "value", optim) or "")
    if variant is None:
        if ours is None:
            raise ValueError(
                f"optim={optim!s} is no optimizer of adamw_triton: pass variant=, one of "
                f"{', '.join(map(repr, VARIANTS))}, or set optim to one of {', '.join(OPTIMIZERS)}"
            )
        variant = ours
    kwargs: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "variant": variant,
    }
    found = {**kwargs, **parse_optim_args(getattr(args, "optim_args", None)), **settings}
    clipped = getattr(args, "max_grad_norm", None)
    if found.get("gradient_release") and found.get("max_grad_norm") is None:
        found["max_grad_norm"] = math.inf  # for the log: the Trainer's own pass finds no gradients
        if clipped:
            warnings.warn(
                f"TrainingArguments(max_grad_norm={clipped}) clips at most what is left over for step(), by "
                "the norm of that: with gradient_release=true no other gradient is left to it. Set "
                "max_grad_norm=0, and adaptive_clip=1.05 in optim_args",
                stacklevel=2,
            )
    elif found.get("max_grad_norm") is not None and clipped:
        warnings.warn(
            f"gradients are clipped twice: by the Trainer to max_grad_norm={clipped}, and what is left "
            f"by the optimizer to {found['max_grad_norm']}; set TrainingArguments(max_grad_norm=0)",
            stacklevel=2,
        )
    return AdamW, found


def parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """``"key=value,..."`` with each value in the type that AdamW's signature gives it.

    Raises:
        ValueError: names the key, its value and what is allowed.
    """
    kinds = allowed_keys()
    found: dict[str, Any] = {}
    for key, text in _pairs(optim_args):
        if key in _SET_ELSEWHERE:
            raise ValueError(f"optim_args: {key}={text} does not belong there: {_SET_ELSEWHERE[key]}")
        if key not in kinds:
            raise ValueError(f"optim_args: unknown key {key!r} (={text}); allowed are {', '.join(kinds)}")
        if key in found:
            raise ValueError(f"optim_args: {key} is given twice, {found[key]!r} and {text}")
        found[key] = _typed(key, text, kinds[key])
    return found


def allowed_keys() -> dict[str, tuple[Any, ...]]:
    """The arguments of AdamW that ``optim_args`` may set, each with its types."""
    hints = typing.get_type_hints(AdamW.__init__)
    return {
        name: typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
        for name, hint in hints.items()
        if name != "return" and name not in _SET_ELSEWHERE
    }


def _pairs(optim_args: str | Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if isinstance(optim_args, Mapping):
        return [(key, str(value)) for key, value in optim_args.items()]
    pairs = []
    for piece in (optim_args or "").split(","):
        key, equals, value = map(str.strip, piece.partition("="))
        if equals and key and value:
            pairs.append((key, value))
        elif piece.strip():
            raise ValueError(
                f"optim_args: {piece.strip()!r} is not key=value; expected key=value,key=value,... "
                f"with keys of {', '.join(allowed_keys())}"
            )
    return pairs


def _typed(key: str, text: str, kinds: tuple[Any, ...]) -> Any:
    """``text`` as the first of ``kinds`` that it can be, one of some words next to last, any text last."""
    for kind in sorted(kinds, key=lambda kind: _STRICTEST_FIRST.index(_kind(kind))):
        try:
            return _READERS[_kind(kind)](text, *typing.get_args(kind))
        except (KeyError, ValueError):
            continue
    allowed = " or ".join(each for kind in kinds for each in typing.get_args(kind) or (_EXPECTED[kind],))
    raise ValueError(f"optim_args: {key}={text} is invalid; {key} must be {allowed}")


def _kind(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _word(text: str, *allowed: str) -> str:
    return {word: word for word in allowed}[text]


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError
    return found


_UNIONS = (typing.Union, types.UnionType)
_READERS: dict[Any, Any] = {
    types.NoneType: lambda text: {"none": None}[text.lower()],
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    torch.dtype: _dtype,
    typing.Literal: _word,
    str: str,
}
_STRICTEST_FIRST = list(_READERS)
_EXPECTED = {
    types.NoneType: "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    torch.dtype: "a dtype like float32",
    str: "text",
}
