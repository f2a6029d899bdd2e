"""What would fit where nothing does: the fewest changes to a run, the least of them first."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from adamw_triton.fits.answers import Question, hungriest
from adamw_triton.models import Model

RANK = 16
"""Of adapters that are tried."""
SHORTEST = 256
"""Tokens of a sequence; who trains on shorter ones knows it."""
SHOWN = 3
"""Ways; more is no help."""


class Change(NamedTuple):
    """To the arguments of a run."""

    typed: str
    settings: dict[str, Any]
    """By the names that argparse gives them."""
    milder: tuple[Change, ...] = ()
    """Ones that do less of it, the least first."""


class Way(NamedTuple):
    """Changes that together let something fit, none of which can be left out."""

    options: str
    chosen: str
    """The variant that fits then."""


def possible(arguments: argparse.Namespace) -> Iterator[Change]:
    """Those that would do anything, the cheapest first: to the same bits, with the same weights trained, then
    others."""
    if arguments.no_checkpointing:
        yield Change("without --no-checkpointing", {"no_checkpointing": False})
    if arguments.ranks > 1 and arguments.sharding == "none":
        yield Change("--sharding full", {"sharding": "full"})
    if arguments.ranks == 1:
        summed = arguments.accumulation > 1 and arguments.accumulate_on != "host"
        if not arguments.release or summed:
            typed = ("" if arguments.release else "--release") + " --accumulate-on host" * summed
            yield Change(typed.strip(), {"release": True} | ({"accumulate_on": "host"} if summed else {}))
    yield from _by_halves("--batch", "batch", arguments.batch, 1)
    if arguments.dtype in (None, "fp32"):
        yield Change("--dtype bf16", {"dtype": "bf16"})
    yield from _by_halves("--seq", "seq", arguments.seq, SHORTEST)
    rank = arguments.lora or RANK
    if arguments.lora is None:
        yield Change(f"--lora {RANK}", {"lora": RANK})
    if arguments.quantized_base is None:
        typed = "--quantized-base 4" if arguments.lora else f"--lora {RANK} --quantized-base 4"
        yield Change(typed, {"lora": rank, "quantized_base": 4})


def _by_halves(option: str, name: str, value: int, least: int) -> Iterator[Change]:
    """The least that it can be, and milder ones; none if it is that."""
    changes: list[Change] = []
    while value // 2 >= least:
        value //= 2
        changes.append(Change(f"{option} {value}", {name: value}))
    if changes:
        *milder, most = changes
        yield most._replace(milder=tuple(milder))


def that_fit(arguments: argparse.Namespace, question: Question, models: Sequence[Model]) -> list[Way]:
    """Minimal ways: all that is possible, less one change after the other as long as something fits. Each
    begins with another one that it tries to do without."""
    tried: dict[tuple[str, ...], str | None] = {}

    def chosen(changes: list[Change]) -> str | None:
        key = tuple(change.typed for change in changes)
        if key not in tried:
            settings = {name: value for change in changes for name, value in change.settings.items()}
            changed = argparse.Namespace(**{**vars(arguments), **settings})
            found = hungriest(changed, question, models).plan.chosen
            tried[key] = None if found is None else found.name
        return tried[key]

    def can_be_asked(change: Change) -> bool:
        try:
            chosen([change])
        except ValueError:
            return False
        return True

    usable = [change for change in possible(arguments) if can_be_asked(change)]
    if not usable or chosen(usable) is None:
        return []
    found: dict[tuple[int, ...], Way] = {}
    for first in usable:
        left = usable
        for change in (first, *reversed(usable)):
            without = [each for each in left if each is not change]
            if chosen(without) is not None:
                left = without
        eased = [_mildest(change, left, chosen) for change in left]
        cost = tuple(sorted(map(usable.index, left), reverse=True))
        found[cost] = Way(" ".join(change.typed for change in eased), chosen(eased) or "")
    return [found[cost] for cost in sorted(found)][:SHOWN]


def _mildest(change: Change, among: Sequence[Change], chosen: Callable[[list[Change]], str | None]) -> Change:
    for mild in change.milder:
        if chosen([mild if each is change else each for each in among]) is not None:
            return mild
    return change


def lines(ways: Sequence[Way]) -> Iterator[str]:
    """For people."""
    if not ways:
        yield "Nothing fits, whatever is changed here: it takes a larger card, or more host memory."
        return
    yield "Nothing fits. What would, the least change first:"
    for way in ways:
        yield f"  {way.options} ({way.chosen})"
