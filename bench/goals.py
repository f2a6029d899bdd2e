"""``python -m bench goals [FOLDER]``: what must be shown on a GPU, and what the suites' results there say.

Each goal is a row of ``GOALS``: where its figure stands in the JSON of a suite, and what it is to be. A
figure that is not there is "not measured", with the reason that the suite gives; none is computed anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.figures import NotMeasured, Read, Results, failures, figure, largest, off, ratio
from bench.report import Cell, Table

# --- The goals -----------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def times(value: float) -> str:
    return f"{value:.3g}x"


def seconds(value: float) -> str:
    return f"{1e6 * value:.0f} µs" if value < 1e-3 else f"{value:.3g} s"


def number(value: float) -> str:
    return f"{value:.3g}"


def count(value: float) -> str:
    return f"{value:.0f}"


@dataclass(frozen=True)
class Goal:
    """One row. Without limits it is only told."""

    what: str
    read: Read
    show: Callable[[float], str]
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def asked(self) -> str:
        if self.least is not None:
            return f"at least {self.show(self.least)}"
        return "" if self.most is None else f"at most {self.show(self.most)}"

    def met(self, value: float) -> bool:
        """Never by a figure that is not a number."""
        above = self.least is None or value >= self.least
        return math.isfinite(value) and above and (self.most is None or value <= self.most)


OURS = {bits: f"adamw_triton {bits}bit" for bits in (8, 32)}
LORA = "LoRA, 300 tensors, bf16"
PER_TENSOR = {
    "bitsandbytes 32-bit": 32,
    "optimi": 32,
    "bitsandbytes 8-bit": 8,
    "torchao 8-bit": 8,
    "flashoptim 8-bit": 8,
}
"""Peers that launch kernels for each tensor, and the bits of their state."""
PAGED = ("adamw_triton paged_8bit", "adamw_triton paged_8bit, released")
BESIDE = ("torchao CPU offload", "bitsandbytes paged 8-bit")
VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")
TESTED = {
    "kernels against float64 on the CPU": "tests/kernels/test_against_float64.py",
    "paged against resident bit for bit": "tests/paging/test_on_gpu.py",
    "the same beside other work": "tests/paging/test_under_load.py",
    "two processes on one GPU": "tests/paging/test_two_processes.py",
    "CUDA graphs": "tests/optimizer/test_capturable.py",
    "auto under a balloon trains without OOM, bytes within 1% of its plan": "tests/selection/test_on_gpu.py",
    "clipping and sick gradients": "tests/optimizer/test_clipping_on_gpu.py",
    "gradient release": "tests/optimizer/test_release_on_gpu.py",
    "state that moves, streams, a fork": "tests/paging/test_moves_on_gpu.py",
}


def step(case: str, key: str, name: str = "median") -> Read:
    return figure("step", "cases", case, "optimizers", key, name)


def faster(case: str, ours: str, peer: str) -> Read:
    """How many times longer the peer takes."""
    return ratio(step(case, peer), step(case, ours))


def share_of_link(bits: int) -> Read:
    """By the better of both ways, which is what ``transfer="auto"`` takes."""
    ways = (f"adamw_triton paged_{bits}bit, {way}" for way in ("copy", "zero_copy"))
    return largest(*(figure("paged", "optimizers", key, "share_of_link") for key in ways))


def added(model: str, key: str, tokens: int) -> Read:
    """To forward and backward of so many tokens, as a share of them."""
    return figure("tokens", "models", model, "optimizers", key, str(tokens), "added")


def limited(model: str, name: str) -> Read:
    return figure("limit", "models", model, name)


def placed(variant: str, name: str) -> Read:
    return figure("memory", "optimizers", f"adamw_triton {variant}", name, "gpu")


def billion() -> list[Goal]:
    """State on the GPU, a tensor of 1e9 elements."""
    found = []
    for dtype in ("bf16", "fp32"):
        case = f"1.1e9, {dtype}"
        theirs = (
            "torch's state is bf16 there: 14 bytes an element, ours, exact, 22" if dtype == "bf16" else ""
        )
        found += [
            Goal(f"32-bit, {dtype}: of the copy's bandwidth",
                 step(case, OURS[32], "share_of_copy"), percent, least=0.95),
            Goal(f"32-bit, {dtype}: torch fused takes",
                 faster(case, OURS[32], "torch fused"), times, least=1, note=theirs),
            Goal(f"8-bit, {dtype}: of the copy's bandwidth",
                 step(case, OURS[8], "share_of_copy"), percent, least=0.92),
        ]  # fmt: skip
        for peer, least in (("bitsandbytes 8-bit", 1.5), ("flashoptim 8-bit", 1.2), ("torchao 8-bit", 1.5)):
            found.append(
                Goal(f"8-bit, {dtype}: {peer} takes", faster(case, OURS[8], peer), times, least=least)
            )
    return found


GOALS = (
    Goal("GPU tests that fail", failures(), count, most=0),
    *(Goal(f"that fail: {about}", failures(file), count, most=0) for about, file in TESTED.items()),
    *(Goal(f"{tool}: found", figure("sanitize", "tools", tool, "found"), count, most=0)
      for tool in ("memcheck", "racecheck")),
    *billion(),
    *(Goal(f"300 LoRA tensors: {peer} takes", faster(LORA, OURS[bits], peer), times, least=5)
      for peer, bits in PER_TENSOR.items()),
    Goal("300 LoRA tensors: torch fused takes", faster(LORA, OURS[32], "torch fused"), times, least=1),
    Goal("300 LoRA tensors: host's time of a step",
         figure("host", "seconds", "300", "adamw_triton", "median"), seconds, most=150e-6),
    *(Goal(f"paged {bits}-bit: of the link, both ways at once", share_of_link(bits), percent, least=0.9)
      for bits in (8, 32)),
    *(Goal(f"{variant}: GPU bytes off what was predicted",
           off(placed(variant, "measured"), placed(variant, "predicted")), percent, most=0.01)
      for variant in VARIANTS),
    *(Goal(f"exact weights, {bits}-bit, bf16: takes of the same without",
           faster("1.1e9, bf16", OURS[bits], f"{OURS[bits]}, exact"), times, most=1.1,
           note=f"it moves {bytes_} bytes an element")
      for bits, bytes_ in ((32, "26 instead of 22"), (8, "14 instead of 10"))),
    *(Goal(f"a {model} Llama, {tokens:,} tokens: {key} adds", added(model, key, tokens), percent)
      for model, counts in (("1B", (2048, 8192, 32768)), ("3B", (2048, 8192)))
      for tokens in counts for key in (*PAGED, *BESIDE)),
    *(Goal(f"statistics at every step, {variant}: of a plain step", figure("telemetry", "ratios", variant),
           times, most=1.3)
      for variant in ("32bit", "8bit")),
    Goal("telemetry=10: of a training step of a small Llama", figure("telemetry", "training", "share"),
         percent, most=0.01),
    Goal("3B, fine-tuned with release: peak off its plan",
         limited("Llama-3.2-3B", "off_plan"), percent, most=0.02),
    Goal("8B in 24 GB, fine-tuned with release: parameters",
         limited("Llama-3.1-8B in 24 GB", "parameters"), number, least=8e9),
    Goal("the largest in 24 GB: parameters", limited("the deepest in 24 GB", "parameters"), number),
    *(Goal(f"first step, {how}", largest(*(figure("first", "variants", v, how) for v in ("32bit", "8bit"))),
           seconds, most=most)
      for how, most in (("cold", 3.0), ("cached", 0.3))),
)  # fmt: skip


# --- Judging -------------------------------------------------------------------------------------------

FINISHED = ("done", "a goal missed", "cannot run")


@dataclass(frozen=True)
class Judged:
    """A goal beside what was measured."""

    goal: Goal
    value: float | None
    why: str = ""
    """There is no value."""

    @classmethod
    def of(cls, goal: Goal, results: Results, ended: Mapping[str, str]) -> Judged:
        """``ended`` says how suites did."""
        try:
            return cls(goal, goal.read(results))
        except NotMeasured as reason:
            how = ended.get(reason.suite, "done")
            return cls(goal, None, f"{reason}" if how in FINISHED else f"{reason} ({reason.suite}: {how})")

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if not self.goal.asked:
            return "told"
        return "met" if self.goal.met(self.value) else "missed"

    def record(self) -> dict[str, Any]:
        said = {"goal": self.goal.what, "asked": self.goal.asked, "measured": self.value}
        return {**said, "verdict": self.verdict, "why": self.why, "note": self.goal.note}


def judge(results: Results, ended: Mapping[str, str]) -> list[Judged]:
    """All of them."""
    return [Judged.of(goal, results, ended) for goal in GOALS]


STYLES = {"met": "good", "missed": "bad", "told": "", "not measured": ""}


def table(judged: Sequence[Judged], machine: str) -> Table:
    """For people."""
    rows: list[list[Cell | str]] = []
    for one in judged:
        shown = "" if one.value is None else one.goal.show(one.value)
        verdict = f"{one.verdict}: {one.why[:100]}" if one.why else one.verdict
        rows.append([one.goal.what, one.goal.asked, shown, Cell(verdict, STYLES[one.verdict])])
    verdicts = [one.verdict for one in judged]
    totals = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in STYLES)
    notes = [totals, *(f"{one.goal.what}: {one.goal.note}" for one in judged if one.goal.note)]
    return Table(f"Goals on {machine}", ["goal", "asked", "measured", "verdict"], rows, notes)


def load(folder: Path) -> dict[str, Any]:
    """Every suite's JSON in a folder, but for one that was stopped while it wrote."""
    suites = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(json.JSONDecodeError):
            suites[path.stem] = json.loads(path.read_text())
    return {name: data for name, data in suites.items() if "run" in data and name != "goals"}


def finish(folder: Path, ended: Mapping[str, str], command: str) -> int:
    """Judge what is in a folder, show and save: 0 if all goals are met, 1 if one is missed, 2 if one is not
    measured."""
    results = load(folder)
    judged = judge(results, ended)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = report.environment("goals", [], 0, device) | {"command": command}
    measured_on = {each["run"]["gpu"] for each in results.values()} - {None}
    shown = table(judged, ", ".join(sorted(measured_on)) or f"a machine without a GPU ({run['cpu']})")
    report.show(shown, report.console())
    data = {"goals": [one.record() for one in judged], "ended": dict(ended)}
    report.save(folder, "goals", run, [shown], data)
    verdicts = {one.verdict for one in judged}
    return 1 if "missed" in verdicts else 2 if "not measured" in verdicts else 0


def main(argv: Sequence[str]) -> int:
    """Judge what there is."""
    parser = argparse.ArgumentParser(prog="python -m bench goals", description=__doc__)
    default = report.RESULTS / report.machine_slug("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=default, help=f"of results (default {default})"
    )
    folder = parser.parse_args(argv).folder
    return finish(folder, {}, f"python -m bench goals {folder}")
