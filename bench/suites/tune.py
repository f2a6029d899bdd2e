"""``python -m bench tune``: the kernels at other sizes of their programs, on the GPU that is here.

What stands beside a kernel's constants as their reason is measured so: one tensor of 2**29 elements, state on
the GPU, a copy of 1 GiB beside it. The first row of each kernel is what it has; for other targets `bench
audit` tells what a choice costs there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track

from adamw_triton_kernels import adamw_8bit, adamw_32bit, launch
from bench import report, suite
from bench.optimizers import give_back
from bench.peers import state_bytes
from bench.report import Cell, Table, number
from bench.timing import COPY, Spread, Timer, copy_bandwidth, copying, interleaved

ELEMENTS = {"cuda": 1 << 29, "cpu": 1 << 20}
ROUNDS = 9


@dataclass(frozen=True)
class Choice:
    """What a kernel is compiled with; without sizes, what it has."""

    threads: int | None = None
    tile: int | None = None
    registers: int | None = None

    @property
    def name(self) -> str:
        sizes = "as it is" if self.threads is None else f"{self.threads} threads, {self.tile} elements"
        return sizes if self.registers is None else f"{sizes}, {self.registers} registers"


@dataclass(frozen=True)
class Kernel:
    """One build, and what is tried for it."""

    bits: int
    dtype: str
    block: int = 128
    exact: bool = False
    choices: tuple[Choice, ...] = ()

    @property
    def name(self) -> str:
        block = f" block {self.block}" if self.bits == 8 else ""
        return f"{self.bits}bit{block} {self.dtype}{', exact' if self.exact else ''}"


SMALL, NARROW = Choice(64, 512), Choice(128, 1024)
KERNELS = (
    Kernel(8, "bf16", choices=(Choice(128, 2048), SMALL)),
    Kernel(8, "bf16", exact=True, choices=(Choice(128, 2048), SMALL)),
    Kernel(8, "fp32", choices=(Choice(128, 2048), SMALL)),
    Kernel(8, "bf16", 256, choices=(SMALL, NARROW, Choice(128, 2048, 128))),
    Kernel(8, "bf16", 256, exact=True, choices=(SMALL,)),
    Kernel(32, "bf16", choices=(NARROW, Choice(256, 1024))),
    Kernel(32, "bf16", exact=True, choices=(NARROW,)),
    Kernel(32, "fp32", choices=(NARROW, Choice(256, 1024))),
)


@contextlib.contextmanager
def chosen(kernel: Kernel, choice: Choice) -> Iterator[None]:
    """Within, kernels are compiled anew, with this."""
    names: dict[str, Any] = {}
    if choice.threads is not None and kernel.bits == 8:
        tail = min(choice.tile or 0, adamw_8bit.SHAPES[kernel.block][2])
        names["SHAPES"] = adamw_8bit.SHAPES | {kernel.block: (choice.threads, choice.tile, tail)}
    elif choice.threads is not None:
        names |= {"THREADS": choice.threads, "TILE": choice.tile}
    if choice.registers is not None:
        names["_registers"] = lambda *_: choice.registers
    module = adamw_8bit if kernel.bits == 8 else adamw_32bit
    before = {name: getattr(module, name) for name in names}
    compiled = dict(launch._compiled)
    launch._compiled.clear()
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
        launch._compiled.clear()
        launch._compiled.update(compiled)


@dataclass(frozen=True)
class Measured:
    """One choice."""

    spread: Spread
    share: float
    """Of the copy's bandwidth."""
    registers: int
    spilled: int


def measure(kernel: Kernel, choice: Choice, device: str, seed: int) -> Measured:
    """Each in turn with a copy."""
    import adamw_triton

    elements, timer = ELEMENTS[device], Timer(device, ahead=True)
    torch.manual_seed(seed)
    param = torch.randn(elements, device=device).to(suite.DTYPES[kernel.dtype]).requires_grad_()
    param.grad = torch.randn(elements, device=device).mul_(1e-3).to(param.dtype)
    with chosen(kernel, choice):
        optimizer = adamw_triton.AdamW(
            [param], 1e-4, variant=f"{kernel.bits}bit", block_size=kernel.block, master_weights=kernel.exact
        )
        for _ in range(3):
            timer.wall(optimizer.step)
        found = next(iter(launch._compiled.values()), None)
        spreads = interleaved(
            {"step": optimizer.step, COPY: copying(device)}, ROUNDS if device == "cuda" else 3, timer, seed
        )
    moved = 3 * param.nbytes + 2 * state_bytes(optimizer)
    share = moved / spreads["step"].median / copy_bandwidth(spreads[COPY], device)
    return Measured(
        spreads["step"], share, getattr(found, "n_regs", 0) or 0, getattr(found, "n_spills", 0) or 0
    )


def table(results: dict[str, dict[str, Measured]], reasons: dict[str, str]) -> Table:
    rows: list[list[Cell | str]] = []
    for kernel, choices in results.items():
        for place, (choice, got) in enumerate(choices.items()):
            style = "" if place else "bold"
            spread = got.spread
            time = f"{number(1e3 * spread.median)} ± {number(500 * (spread.high - spread.low), 2)}"
            cells = [kernel, choice, time, f"{got.share:.1%}", str(got.registers), str(got.spilled)]
            rows.append([Cell(cell, style) for cell in cells])
    notes = [f"{key} could not run: {why}" for key, why in reasons.items()]
    columns = ["kernel", "program", "ms a step", "of the copy", "registers", "spilled"]
    return Table("Programs of other sizes", columns, rows, notes)


def main(argv: Sequence[str]) -> int:
    """Measure, show and save."""
    options = suite.parser("tune", __doc__).parse_args(argv)
    results: dict[str, dict[str, Measured]] = {}
    reasons: dict[str, str] = {}
    kernels = KERNELS[:1] if options.quick else KERNELS
    for kernel in track(kernels, "tune", console=report.console()):
        for choice in (Choice(), *kernel.choices[: 1 if options.quick else None]):
            try:
                got = measure(kernel, choice, options.device, options.seed)
                results.setdefault(kernel.name, {})[choice.name] = got
            except Exception as error:  # a choice that this GPU or compiler refuses
                reasons[f"{kernel.name}, {choice.name}"] = f"{type(error).__name__}: {error}"[:200]
            give_back(options.device)
        data = {
            "elements": ELEMENTS[options.device],
            "refused": reasons,
            "kernels": {
                name: {
                    choice: {
                        **got.spread.record(),
                        "share_of_copy": got.share,
                        "registers": got.registers,
                        "spilled": got.spilled,
                    }
                    for choice, got in choices.items()
                }
                for name, choices in results.items()
            },
        }
        suite.write("tune", argv, options, [table(results, reasons)], data)
    suite.finish("tune", argv, options, [table(results, reasons)], data)
    return 0
