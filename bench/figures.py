"""Figures in the JSON that suites leave: where each stands, and what is made of two of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Results = Mapping[str, Any]
"""By suite, its JSON."""
Read = Callable[[Results], float]


class NotMeasured(Exception):
    """By which suite, and why."""

    def __init__(self, suite: str, why: str) -> None:
        super().__init__(why)
        self.suite = suite


def results_of(results: Results, suite: str) -> Any:
    """A suite's JSON, of a GPU."""
    if suite not in results:
        raise NotMeasured(suite, f"{suite} left no results")
    if not results[suite]["run"]["gpu"]:
        raise NotMeasured(suite, "no GPU")
    return results[suite]


def figure(suite: str, *path: str) -> Read:
    """The number at a path in a suite's JSON."""

    def read(results: Results) -> float:
        found = results_of(results, suite)
        reasons: Mapping[str, str] = {}
        for key in path:
            reasons = found.get("cannot_run", reasons)
            if found.get(key) is None:
                missing = found.get("why") or f"{suite} has no {key}"
                raise NotMeasured(suite, f"{key}: {reasons[key]}" if key in reasons else missing)
            found = found[key]
        return float(found)

    return read


def ratio(over: Read, under: Read) -> Read:
    return lambda results: over(results) / under(results)


def off(measured: Read, predicted: Read) -> Read:
    """How far the first is from the second, as a share of it."""
    return lambda results: abs(measured(results) / predicted(results) - 1)


def largest(*reads: Read) -> Read:
    """NaN if there is one."""
    return lambda results: max(
        (read(results) for read in reads), key=lambda value: (math.isnan(value), value)
    )


def failures(file: str | None = None) -> Read:
    """Tests that failed, of one file or in all. Tests that were stopped before they had all run, or did not
    run at all, are not measured."""

    def read(results: Results) -> float:
        found = results_of(results, "gputests")
        counts = found["total"] if file is None else found["files"].get(file)
        if counts is None or not counts["passed"] + counts["failed"]:
            raise NotMeasured("gputests", "none of these tests ran")
        if not counts["failed"] and found["stopped"] + found["broken"]:
            raise NotMeasured("gputests", "the tests were stopped before their end")
        return float(counts["failed"])

    return read
