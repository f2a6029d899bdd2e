"""``python -m bench first``: seconds of an optimizer's first step, in a process of its own.

Once with an empty cache of Triton's, so that everything is compiled, and once more with what that left.
Imports, the GPU's context and the making of the optimizer, for which torch imports its compiler, are told
apart. On a CPU nothing is compiled.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import children, suite
from bench.report import Cell, Table, number

VARIANTS = ("32bit", "8bit")
HOW = ("cold", "cached")
LIMIT = 120
"""Seconds of one process."""
CHILD = """
import importlib, json, sys, time
start = time.perf_counter()
import torch
from adamw_triton import AdamW
device, variant = sys.argv[1:]
name = "adamw_triton_kernels.adamw_" + variant
importlib.import_module(name if device == "cuda" else "adamw_triton_kernels.reference")
imported = time.perf_counter()
param = torch.ones(1 << 20, dtype=torch.bfloat16, device=device, requires_grad=True)
param.grad = torch.ones_like(param)
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
wait()
ready = time.perf_counter()
optimizer = AdamW([param], lr=0.1, variant=variant)
made = time.perf_counter()
optimizer.step()
wait()
stepped = time.perf_counter()
optimizer.step()
wait()
second = time.perf_counter() - stepped
assert not (param == 1).any()
print(json.dumps([imported - start, ready - imported, made - ready, stepped - made, second]))
"""
PARTS = ("imports", "context", "optimizer", "first", "second")


def measure(device: str, variant: str, cache: Path) -> dict[str, float]:
    """Seconds of each part of a process."""
    env = children.environment(TRITON_CACHE_DIR=str(cache))
    with tempfile.TemporaryFile("w+") as log:
        code = children.run([sys.executable, "-c", CHILD, device, variant], LIMIT, env, log)
        log.seek(0)
        said = log.read()
    if code != 0:
        raise RuntimeError(f"a first step of {variant} on {device} ended with {code}: {said[-2000:]}")
    return dict(zip(PARTS, json.loads(said.splitlines()[-1]), strict=True))


def record(parts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """For the JSON."""
    firsts = {variant: {how: got["first"] for how, got in of.items()} for variant, of in parts.items()}
    return {"variants": firsts, "parts": parts}


def main(argv: Sequence[str]) -> int:
    """Measure, show and save."""
    options = suite.parser("first", __doc__).parse_args(argv)
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for variant in VARIANTS[:1] if options.quick else VARIANTS:
        with tempfile.TemporaryDirectory() as cache:
            parts[variant] = {how: measure(options.device, variant, Path(cache)) for how in HOW}
    rows: list[list[Cell | str]] = [
        [f"{variant}, {how}", *(number(got[part]) for part in PARTS)]
        for variant, of in parts.items()
        for how, got in of.items()
    ]
    notes = [
        "context: the GPU's, and the tensors; optimizer: torch imports its compiler for any",
        "cold: Triton's cache is empty; one process each",
    ]
    shown = Table(
        "Seconds to the first step",
        ["", "imports", "context", "optimizer", "first step", "second step"],
        rows,
        notes,
    )
    suite.finish("first", argv, options, [shown], record(parts))
    return 0
