"""Writes dashboard.json, for Grafana, from the table of names by which adamw_triton exports its numbers.

    python examples/monitoring/dashboard.py

Panels are a list here: change it, run it, import the file again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from adamw_triton.monitoring.names import (
    INFO,
    LEARNING_RATE,
    MEMORY,
    OF_PARAMETERS,
    SKIPPED,
    SPILLS,
    TOTALS,
)

FILE = Path(__file__).with_name("dashboard.json")
COLUMNS = 24
"""Of Grafana's grid."""
HEIGHT = 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = '{instance=~"$instance"}'
OF_CHOSEN = '{instance=~"$instance", parameter=~"$parameter"}'

NORM = {key: TOTALS[key].name for key in TOTALS}
"""Names, by the key in ``stats()``."""


class Panel(NamedTuple):
    title: str
    queries: tuple[tuple[str, str], ...]
    """Each with its legend."""
    description: str = ""
    unit: str = "none"
    log: bool = False
    kind: str = "timeseries"
    width: int = 8


def total(key: str, legend: str = "{{instance}}") -> tuple[str, str]:
    return NORM[key] + RUN, legend


OVERVIEW = (
    Panel(
        "State",
        ((INFO.name + RUN, "{{variant}} {{chosen}}"),),
        "Which variant was asked for, and what variant=auto chose",
        kind="stat",
        width=8,
    ),
    Panel("Step", (total("step"),), TOTALS["step"].help, kind="stat", width=8),
    Panel(
        "Steps a second",
        ((f"deriv({NORM['step']}{RUN}[5m])", "{{instance}}"),),
        "Over five minutes",
        kind="stat",
        width=8,
    ),
    Panel(
        "Norms",
        (total("grad_norm", "gradient"), total("weight_norm", "weight"), total("update_norm", "update")),
        "Of all parameters together; the gradient's before clipping",
        log=True,
    ),
    Panel("Update ratio", (total("update_ratio"),), TOTALS["update_ratio"].help, log=True),
    Panel(
        "Lost updates",
        (total("lost_share"),),
        TOTALS["lost_share"].help
        + ". With master_weights none are lost; stochastic rounding is right on average",
        "percentunit",
    ),
    Panel(
        "Learning rates",
        ((LEARNING_RATE.name + RUN, "group {{group}}"), total("effective_lr", "effective")),
        "Of the groups; the effective one is what the first moment is multiplied by",
        log=True,
    ),
    Panel(
        "Weight decay's share of the update",
        (total("decay_share"),),
        TOTALS["decay_share"].help,
        "percentunit",
    ),
    Panel("Memory", ((MEMORY.name + RUN, "{{place}}"),), MEMORY.help, "bytes"),
)

ON_CALL = (
    Panel(
        "Alerts that fire",
        (
            (
                'ALERTS{alertname=~"AdamW.*", alertstate="firing", instance=~"$instance"}',
                "{{alertname}} {{instance}}",
            ),
        ),
        "Of alerts.yml",
        width=12,
    ),
    Panel(
        "NaN and Inf elements of the gradients",
        (total("nan_count", "NaN"), total("inf_count", "Inf")),
        "At the last step that was looked at; skipped steps also count what comes and goes between scrapes",
        width=12,
    ),
    Panel(
        "Skipped steps",
        ((f"increase({SKIPPED.name}{RUN}[10m])", "{{instance}}"),),
        f"{SKIPPED.help}: in 10 minutes",
    ),
    Panel(
        "Spills", ((f"increase({SPILLS.name}{RUN}[10m])", "{{instance}}"),), f"{SPILLS.help}: in 10 minutes"
    ),
    Panel(
        "Gradient norm over its median of half an hour",
        (
            (
                f"{NORM['grad_norm']}{RUN} / quantile_over_time(0.5, {NORM['grad_norm']}{RUN}[30m])",
                "{{instance}}",
            ),
        ),
        "An alert is raised at 10",
        log=True,
    ),
    Panel("Clip coefficient", (total("clip_coefficient"),), TOTALS["clip_coefficient"].help),
    Panel(
        "Moments",
        (
            total("exp_avg_rms", "m, root mean square"),
            total("exp_avg_sq_mean", "v, mean"),
            total("exp_avg_sq_max", "v, largest"),
        ),
        "What a spike leaves behind in them",
        log=True,
    ),
    Panel(
        "8-bit codes",
        (
            total("top_share", "v at the top"),
            total("bottom_share", "v at the bottom"),
            total("zero_share", "m at zero"),
            total("stalled_share", "v stalled"),
        ),
        "Shares of the codes; there are none where all state has 32 bits",
        "percentunit",
    ),
)

DEBUG = (
    Panel(
        "Largest update ratios",
        ((f"topk(10, {OF_PARAMETERS['update_ratio'].name}{RUN})", "{{parameter}}"),),
        "Of single parameters; far above the others: a layer that explodes",
        kind="bargauge",
        width=12,
    ),
    Panel(
        "Smallest update ratios",
        ((f"bottomk(10, {OF_PARAMETERS['update_ratio'].name}{RUN})", "{{parameter}}"),),
        "Of single parameters; 0: dead, or frozen by mistake",
        kind="bargauge",
        width=12,
    ),
    *(
        Panel(
            metric.help.partition(":")[0],
            ((metric.name + OF_CHOSEN, "{{parameter}}"),),
            "Of each parameter that is chosen above",
            "percentunit" if metric.unit == "ratio" and key != "update_ratio" else "none",
            log=metric.unit != "ratio" or key == "update_ratio",
        )
        for key, metric in OF_PARAMETERS.items()
    ),
)

ROWS = {"Run": OVERVIEW, "On call": ON_CALL, "Layers (start_http_server(..., per_param=True))": DEBUG}


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    return {
        "uid": "adamw-triton",
        "title": "adamw_triton",
        "tags": ["training", "optimizer"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                chooser("instance", f"label_values({TOTALS['step'].name}, instance)"),
                chooser("parameter", f"label_values({OF_PARAMETERS['grad_norm'].name}{RUN}, parameter)"),
            ]
        },
        "panels": list(panels()),
    }


def chooser(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def panels() -> Iterator[dict[str, Any]]:
    """Row by row, from left to right."""
    number, top = 0, 0
    for title, row in ROWS.items():
        number += 1
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        top, left = top + 1, 0
        for panel in row:
            if left + panel.width > COLUMNS:
                top, left = top + HEIGHT, 0
            number += 1
            place = {"x": left, "y": top, "w": panel.width, "h": HEIGHT}
            yield {"id": number, "gridPos": place, **drawn(panel)}
            left += panel.width
        top += HEIGHT


def drawn(panel: Panel) -> dict[str, Any]:
    instant = panel.kind == "bargauge"
    scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
    custom = (
        {"custom": {"scaleDistribution": scale, "showPoints": "never"}} if panel.kind == "timeseries" else {}
    )
    options = {"textMode": "name"} if panel.title == "State" else {}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, **custom}, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend,
                "instant": instant,
                "range": not instant,
            }
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(FILE)
