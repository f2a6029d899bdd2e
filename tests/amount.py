"""How much of a search or of a table a run of the tests takes: usually a part of what is long, and more of it
where the environment asks. ``ADAMW_TRITON_ORDERS=1000`` makes a thousand of what a module calls ORDERS;
``ADAMW_TRITON_SEARCH=1`` takes the whole of every table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import combinations, product
from typing import Any, TypeVar

K = TypeVar("K")
WHOLE = bool(os.environ.get("ADAMW_TRITON_SEARCH"))
"""Whether all of every table is asked for."""


def asked(what: str, usual: int) -> int:
    """How many: as ``ADAMW_TRITON_<what>`` has it, or as usual."""
    return int(os.environ.get(f"ADAMW_TRITON_{what}", usual))


def searched(
    what: str, usual: int, interpreted: int, **strategies: Any
) -> Callable[[Callable[..., None]], Callable[[str], None]]:
    """hypothesis' ``given``, for tests of the optimizer: so many examples in plain torch, and so many where
    the interpreter, which is slow, runs kernels."""
    from hypothesis import given, settings

    def decorate(check: Callable[..., None]) -> Callable[[str], None]:
        def test(backend: str) -> None:
            count = asked(what, interpreted if backend == "triton" else usual)
            settings(max_examples=count, deadline=None)(given(**strategies)(check))()

        test.__doc__ = check.__doc__
        return test

    return decorate


def covering(cases: Mapping[K, Mapping[str, Hashable]], together: int = 1) -> list[K]:
    """Few of these cases: each parameter has each of its values in one of them at least, and if there are
    more, evenly. ``together``: the same of so many parameters at once, or of all."""
    values = {
        key: set(combinations(sorted(case.items()), min(together, len(case)))) for key, case in cases.items()
    }
    taken: Counter[tuple[tuple[str, Hashable], ...]] = Counter()
    missing, chosen = set[tuple[tuple[str, Hashable], ...]]().union(*values.values()), []
    while missing:
        best = max(values, key=lambda key: (len(values[key] & missing), -sum(taken[v] for v in values[key])))
        missing -= values[best]
        taken.update(values[best])
        chosen.append(best)
    return chosen


def some(*table: Iterable[Hashable], together: int = 2) -> list[tuple[Any, ...]]:
    """Of the product of these, so many that any values of so many ``together`` are in one at least; all of it
    where the whole is asked for."""
    whole = list(product(*table))
    few = covering({case: {str(n): value for n, value in enumerate(case)} for case in whole}, together)
    return whole if WHOLE else [case for case in whole if case in few]
