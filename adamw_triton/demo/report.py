"""What the demo shows: progress bars, a table, a picture of the loss curves."""

import os
import time
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from adamw_triton.demo import DemoError
from adamw_triton.demo.training import SMOOTHING, Result, running_mean

LINE_SECONDS = 10.0

# Grey for the yardstick, then hues that the colour-blind can tell apart (Okabe and Ito).
COLOURS = ("0.7", "#0072B2", "#D55E00", "#009E73", "#CC79A7")


def label(name: str) -> str:
    """What a reader calls the optimizer `name` of OPTIMIZERS."""
    return "torch.optim.AdamW" if name == "torch" else f"adamw_triton {name}"


def progress_bars(console: Console) -> Progress:
    """One bar a task, where a terminal is to draw it in; its field `loss` is the latest loss, as text."""
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        expand=True,
        disable=not (console.is_terminal or console.is_jupyter),
    )


def show_loss(progress: Progress, bar: TaskID, loss: float) -> None:
    """Move `bar` one step on; where none is drawn, print a line now and then."""
    progress.update(bar, advance=1, loss=f"{loss:.3f}")
    task, now = progress.tasks[bar], time.monotonic()
    if progress.disable and (task.finished or now - task.fields.get("said", -LINE_SECONDS) >= LINE_SECONDS):
        progress.update(bar, said=now)
        line = f"{task.description:<24} {task.completed:.0f} of {task.total:.0f} steps, loss {loss:.3f}"
        progress.console.print(line, markup=False, highlight=False)


def results_table(results: list[Result]) -> Table:
    """One row an optimizer; fits 80 columns."""
    table = Table(
        box=SIMPLE_HEAD,
        caption=f"Losses in nats per byte; training: mean of the last {SMOOTHING} steps.\n"
        "Seconds: median of whole steps, forward and backward included.",
        caption_justify="left",
    )
    table.add_column("optimizer", no_wrap=True)
    for heading in ("train\nloss", "validation\nloss", "state bytes\nper parameter", "seconds\nper step"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            label(result.name),
            f"{result.train_loss:.4f}",
            f"{result.validation_loss:.4f}",
            f"{result.state_bytes_per_parameter:.3f}",
            f"{result.seconds_per_step:.4f}",
        )
    return table


def check_picture(path: Path) -> None:
    """Raise DemoError unless a picture can be written to `path`."""
    kinds = sorted(FigureCanvasAgg(Figure()).get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise DemoError(f"cannot draw {str(path)!r}: its ending must be one of {', '.join(kinds)}")
    if not path.parent.is_dir():
        raise DemoError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise DemoError(f"cannot write {str(path)!r}: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DemoError(f"cannot write {str(path)!r}: permission denied")


def draw_curves(results: list[Result], path: Path) -> None:
    """Write the loss curves to `path`, and below them their distance from the first result's."""
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    first = running_mean(results[0].losses)
    for index, result in enumerate(results):
        curve = running_mean(result.losses)
        # Curves that nearly coincide: each later one is thinner and leaves the earlier in sight.
        style = {"color": COLOURS[index % len(COLOURS)], "linewidth": max(1.0, 4 - 1.25 * index)}
        steps = range(1, len(curve) + 1)
        losses.plot(steps, curve, label=legend(result), **style)
        differences.plot(steps, [a - b for a, b in zip(curve, first, strict=True)], **style)
    losses.set(title=f"Training loss, mean of the last {SMOOTHING} steps", ylabel="nats per byte")
    losses.legend(frameon=False)
    differences.set(xlabel="step", ylabel=f"difference from\n{label(results[0].name)}")
    for axes in (losses, differences):
        tidy(axes)
    figure.savefig(path)


def legend(result: Result) -> str:
    """Name, and what its state takes."""
    return f"{label(result.name)}, {result.state_bytes_per_parameter:.2f} bytes of state per parameter"


def tidy(axes: Axes) -> None:
    """A light grid and no box."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
