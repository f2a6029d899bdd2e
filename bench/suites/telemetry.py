"""``python -m bench telemetry``: what statistics cost a step, beside the same numbers taken with torch.

The same parameters and gradients are stepped without statistics, with them at every step, and without while
torch's operations take the same numbers: copies before, norms and counts after. The share of a training step
is that of ``telemetry=10``, of a tenth of what is added, in forward, backward and step of a small Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adamw_triton import AdamW
from adamw_triton_kernels import fusion
from bench import suite, timing, workloads
from bench.report import Cell, Table, number
from bench.timing import Spread, Timer

VARIANTS = ("32bit", "8bit", "paged_8bit")
ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28, "quick": 1 << 18}
ROUNDS = 11
EVERY = 10
MOST, SHARE = 1.3, 0.01
"""The goals: of a plain step, at every step; of a training step, at every tenth."""


def by_torch(optimizer: AdamW) -> dict[str, Tensor]:
    """A step, and the numbers that ``stats()`` has of 32-bit state, on the device."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params]
    before = torch._foreach_clone(params)
    optimizer.step()
    state = [optimizer.state[param] for param in params]
    changes = torch._foreach_sub(params, before)
    found = {
        "grad_norm": torch._foreach_norm(grads),
        "weight_norm": torch._foreach_norm(before),
        "update_norm": torch._foreach_norm(changes),
        "lost": [(change == 0).sum() for change in changes],
        "nan": [grad.isnan().sum() for grad in grads],
        "inf": [grad.isinf().sum() for grad in grads],
    }
    if "exp_avg" in state[0]:  # codes would have to be decoded
        found["exp_avg"] = torch._foreach_norm([each["exp_avg"] for each in state])
        found["exp_avg_sq"] = [each["exp_avg_sq"].mean() for each in state]
        found["exp_avg_sq_max"] = [each["exp_avg_sq"].max() for each in state]
    return {name: torch.stack(list(values)) for name, values in found.items()}


def steps(variant: str, device: str, elements: int, seed: int) -> dict[str, Callable[[], object]]:
    """What is timed: each has tensors of its own."""

    def made(telemetry: bool) -> AdamW:
        shapes = [(elements // 8 // 1024, 1024)] * 8
        params = workloads.tensors(shapes, torch.bfloat16, device, seed)
        return AdamW(params, lr=1e-4, variant=variant, telemetry=telemetry)

    plain, told, torchs = made(False), made(True), made(False)
    functions = {"plain": plain.step, "telemetry": told.step, "torch": lambda: by_torch(torchs)}
    for function in functions.values():
        function()
    return functions


def training_step(device: str, seed: int, timer: Timer, quick: bool) -> dict[str, float]:
    """Seconds of a small Llama's forward and backward, of its optimizer's step, and of one that is told."""
    llama = workloads.Llama(64, 1, 1, 32) if quick else workloads.Llama(256, 4, 8, 256, torch.bfloat16)
    model = llama.model(device, seed)
    batches = llama.batches(device, seed)
    optimizers = {
        name: AdamW(model.parameters(), variant="32bit", telemetry=name == "telemetry")
        for name in ("plain", "telemetry")
    }

    def backward() -> None:
        model.zero_grad()
        torch.autograd.backward(llama.loss(model, next(batches)))

    backward()
    for optimizer in optimizers.values():
        optimizer.step()
    functions = {"backward": backward, **{name: each.step for name, each in optimizers.items()}}
    found = timing.interleaved(functions, ROUNDS, timer, seed)
    return {name: spread.median for name, spread in found.items()}


def share_of(parts: Mapping[str, float]) -> float:
    """Of a training step, what ``telemetry=10`` adds on average."""
    return (parts["telemetry"] - parts["plain"]) / EVERY / (parts["backward"] + parts["plain"])


def record(found: Mapping[str, Mapping[str, Spread]], training: Mapping[str, float]) -> dict[str, Any]:
    """For the JSON."""
    return {
        "seconds": {v: {name: spread.record() for name, spread in of.items()} for v, of in found.items()},
        "ratios": {v: of["telemetry"].median / of["plain"].median for v, of in found.items()},
        "training": {**training, "share": share_of(training)},
    }


def shown(found: Mapping[str, Mapping[str, Spread]], training: Mapping[str, float]) -> list[Table]:
    """For people."""
    rows: list[list[Cell | str]] = []
    for variant, of in found.items():
        plain = of["plain"].median
        ratio = of["telemetry"].median / plain
        rows.append(
            [
                variant,
                number(1e3 * plain),
                Cell(f"{ratio:.2f}x", "good" if ratio <= MOST else "bad"),
                f"{1 + (ratio - 1) / EVERY:.3f}x",
                f"{of['torch'].median / plain:.2f}x",
            ]
        )
    notes = [f"goal: at most {MOST}x at every step. Torch's numbers are fewer where state is in codes."]
    if not fusion.compiles():
        notes.append("Nothing was compiled by torch's compiler.")
    columns = ["state", "plain step, ms", "telemetry=True", f"telemetry={EVERY}", "by torch, each step"]
    share = share_of(training)
    row: list[Cell | str] = [
        number(1e3 * training["backward"]),
        number(1e3 * training["plain"]),
        number(1e3 * training["telemetry"]),
        Cell(f"{share:.2%}", "good" if share <= SHARE else "bad"),
    ]
    return [
        Table("What statistics cost a step", columns, rows, notes),
        Table(
            "Of a training step of a small Llama",
            ["forward and backward, ms", "step, ms", "with statistics, ms", f"telemetry={EVERY} adds"],
            [row],
            [f"goal: at most {SHARE:.0%}"],
        ),
    ]


def main(argv: Sequence[str]) -> int:
    """Measure, show, save; 1 if a goal is missed."""
    options = suite.parser("telemetry", __doc__).parse_args(argv)
    timer = Timer(options.device, ahead=True)
    elements = ELEMENTS["quick" if options.quick else options.device]
    found = {
        variant: timing.interleaved(
            steps(variant, options.device, elements, options.seed), ROUNDS, timer, options.seed
        )
        for variant in VARIANTS
    }
    training = training_step(options.device, options.seed, timer, options.quick)
    data = {"elements": elements, **record(found, training)}
    tables = shown(found, training)
    suite.finish("telemetry", argv, options, tables, data, lambda: drawn(found))
    return int(max(data["ratios"].values()) > MOST or data["training"]["share"] > SHARE)


def drawn(found: Mapping[str, Mapping[str, Spread]]) -> Any:
    """Bars beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.8 * len(found)), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    names = list(found)
    for offset, (key, label, colour) in enumerate(
        (
            ("telemetry", "telemetry=True", suite.OURS),
            ("torch", "by torch's operations", suite.COLOURS["torch"]),
        )
    ):
        heights = [found[name][key].median / found[name]["plain"].median for name in reversed(names)]
        places = [place + 0.35 * (0.5 - offset) for place in range(len(names))]
        axes.barh(places, heights, 0.33, label=label, color=colour)
    suite.label_bars(axes, names, "Statistics at every step", "of a step without", margin=0.1)
    return figure
