"""Pictures of a run: norms and ratios by layer, from what ``optimizer.stats(per_param=True)`` gave::

    history.append(optimizer.stats(per_param=True))  # every so many steps; or JsonLines
    ...
    plots.over_time(history).savefig("layers.png")

Both functions return a ``matplotlib.figure.Figure``, which a notebook shows.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adamw_triton import installing
from adamw_triton.monitoring.json_lines import read_json_lines

History = Iterable[Mapping[str, float]] | str | os.PathLike[str]
"""What ``stats(per_param=True)`` gave, in order; or a file of ``JsonLines``."""

SHOWN = {
    "grad_norm": "gradient norm",
    "weight_norm": "weight norm",
    "update_norm": "update norm",
    "update_ratio": "update / weight",
}
"""What can be added up over the parameters of a layer, and what it is called."""
USUAL = 1e-3
"""An update ratio."""
NAMED = 12
"""Layers have a legend; more are told by their colour alone."""


def layer_of(name: str) -> str:
    """To which layer a parameter belongs: all up to the first number in its name, else its module."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def by_layer(history: History, metric: str) -> tuple[list[float], dict[str, list[float]]]:
    """
    Args:
        metric: one of ``SHOWN``. Norms of a layer are those of all its parameters together, and the ratio is
            that of these.

    Returns:
        Steps, and of each layer, as they come, a value for each step: NaN where it had no gradient.

    Raises:
        ValueError: another metric; or there is nothing about single parameters.
    """
    if metric not in SHOWN:
        raise ValueError(f"metric={metric!r}: allowed are {', '.join(SHOWN)}")
    rows = _rows(history)
    if metric == "update_ratio":
        updates, weights = _norms(rows, "update_norm"), _norms(rows, "weight_norm")
        found = {name: list(map(_ratio, updates[name], weights[name])) for name in updates}
    else:
        found = _norms(rows, metric)
    return [row["step"] for row in rows], found


def over_time(history: History) -> Any:
    """Norms and update ratios of each layer, over the steps; first layers dark, last ones light."""
    figure = _figure((8, 9))
    rows = _rows(history)
    panels = figure.subplots(len(SHOWN), 1, sharex=True)
    for axes, (metric, title) in zip(panels, SHOWN.items(), strict=True):
        steps, layers = by_layer(rows, metric)
        for name, colour in zip(layers, _colours(len(layers)), strict=True):
            axes.plot(steps, layers[name], color=colour, linewidth=1.2, label=name)
        axes.set(yscale="log", ylabel=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].axhline(USUAL, color="0.5", linestyle=":", linewidth=1)
    panels[-1].set_xlabel("step")
    if len(layers) <= NAMED:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def ratio_map(history: History) -> Any:
    """The update ratio of each layer, a row, at each step, as colours: white is the usual 1e-3, red above,
    blue below; grey where nothing moved or nothing is known."""
    from matplotlib.colors import LogNorm

    steps, layers = by_layer(history, "update_ratio")
    figure = _figure((8, 1.5 + 0.22 * max(8, len(layers))))
    axes = figure.subplots()
    values = [[value if value > 0 else math.nan for value in row] for row in layers.values()]
    colours = _colour_map("RdBu_r").with_extremes(bad="0.85")
    scale = LogNorm(USUAL / 1e3, USUAL * 1e3)
    drawn = axes.pcolormesh(
        _edges(steps), [index - 0.5 for index in range(len(layers) + 1)], values, cmap=colours, norm=scale
    )
    axes.set(xlabel="step", yticks=range(len(layers)), yticklabels=list(layers))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="small", length=0)
    figure.colorbar(drawn, label=SHOWN["update_ratio"])
    return figure


def _rows(history: History) -> list[Mapping[str, float]]:
    if isinstance(history, str | os.PathLike):
        history = read_json_lines(history)
    # Between two steps that are looked at, `stats()` gives the first again.
    rows = list({row["step"]: row for row in history if row}.values())
    if not any("/" in key for row in rows for key in row):
        raise ValueError(
            "history has nothing about single parameters: it takes what optimizer.stats(per_param=True) gave"
        )
    return rows


def _norms(rows: Sequence[Mapping[str, float]], metric: str) -> dict[str, list[float]]:
    """Of each layer."""
    squares: dict[str, dict[int, float]] = defaultdict(dict)
    for at, row in enumerate(rows):
        for key, value in row.items():
            kind, _, name = key.partition("/")
            if name and kind == metric:
                of_layer = squares[layer_of(name)]
                of_layer[at] = of_layer.get(at, 0.0) + value * value
    return {
        layer: [math.sqrt(found.get(at, math.nan)) for at in range(len(rows))]
        for layer, found in squares.items()
    }


def _ratio(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole else math.inf


def _edges(steps: Sequence[float]) -> list[float]:
    """Between the steps, and at both ends."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    first = middles[0] - steps[0] if middles else 0.5
    last = steps[-1] - middles[-1] if middles else 0.5
    return [steps[0] - first, *middles, steps[-1] + last]


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(installing.missing("matplotlib", "monitoring")) from error
    return Figure(figsize=size, dpi=120, layout="constrained")


def _colour_map(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def _colours(count: int) -> list[Any]:
    return [_colour_map("viridis")(0.9 * index / max(1, count - 1)) for index in range(count)]
