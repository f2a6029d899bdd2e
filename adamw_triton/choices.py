"""Arguments that are one of a few words: their types, for signatures, and the words, for checks."""

from __future__ import annotations

from typing import Literal, get_args

Auto = Literal["auto"]
VariantName = Literal["auto", "32bit", "8bit", "paged_32bit", "paged_8bit"]
Prefer = Literal["speed", "exact"]
Transfer = Literal["auto", "copy", "zero_copy"]
Nonfinite = Literal["propagate", "skip", "raise"]
AccumulateOn = Literal["gpu", "host"]
StateFormat = Literal["native", "portable"]
Sharding = Literal["full", "none"]

PREFERENCES: tuple[Prefer, ...] = get_args(Prefer)
TRANSFERS: tuple[Transfer, ...] = get_args(Transfer)
NONFINITE: tuple[Nonfinite, ...] = get_args(Nonfinite)
"""What becomes of a step whose gradients are not all finite."""
ACCUMULATE_ON: tuple[AccumulateOn, ...] = get_args(AccumulateOn)
"""Where the gradients of micro-batches add up."""
STATE_FORMATS: tuple[StateFormat, ...] = get_args(StateFormat)
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
"""``fully_shard`` of each layer and of the model (FSDP2), or replicas (DDP)."""


def check_word(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: it is none of them; ``name`` is the argument's.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"Invalid {name}: {value!r}; it must be one of {', '.join(map(repr, allowed))}")
