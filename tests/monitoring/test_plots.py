"""Norms and ratios by layer: what is drawn is what torch says of the layer's parameters together."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from adamw_triton.monitoring import JsonLines, plots
from tests.monitoring.training import Run


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("model.layers.3.experts.7.weight", "model.layers.3"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("0.weight", "0"),
        ("weight", "weight"),
        ("3", "3"),
    ],
)
def test_layers(name: str, layer: str) -> None:
    assert plots.layer_of(name) == layer


def test_a_layer_is_all_its_parameters(tmp_path: Path) -> None:
    run, history, expected = Run(telemetry=2), [], {"0": [], "2": []}
    with JsonLines(tmp_path / "stats.jsonl") as lines:
        for _ in range(6):
            before = {name: param.detach().clone() for name, param in run.model.named_parameters()}
            history.append(run.step())
            lines.write(history[-1])
            if run.steps % 2 == 0:
                for layer, found in expected.items():
                    mine = [value for name, value in before.items() if name.startswith(layer)]
                    found.append(
                        float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in mine])))
                    )
    steps, layers = plots.by_layer(tmp_path / "stats.jsonl", "weight_norm")
    assert steps == [2, 4, 6]
    assert layers == {layer: pytest.approx(found, rel=1e-5) for layer, found in expected.items()}
    assert plots.by_layer(history, "weight_norm") == (steps, layers)  # what stands there twice counts once
    _, updates = plots.by_layer(history, "update_norm")
    ratios = plots.by_layer(str(tmp_path / "stats.jsonl"), "update_ratio")[1]
    for layer, found in ratios.items():
        assert found == pytest.approx([u / w for u, w in zip(updates[layer], layers[layer], strict=True)])


def test_what_has_no_gradient_and_what_has_no_weight() -> None:
    history = [
        {"step": 1, "update_norm/0.weight": 3.0, "weight_norm/0.weight": 6.0},
        {"step": 5, "update_norm/0.weight": 0.0, "weight_norm/0.weight": 0.0,
         "update_norm/1.weight": 1.0, "weight_norm/1.weight": 0.0},
    ]  # fmt: skip
    steps, layers = plots.by_layer([{}, *history], "update_ratio")
    assert steps == [1, 5]
    assert layers["0"] == [0.5, 0.0]
    assert math.isnan(layers["1"][0])
    assert layers["1"][1] == math.inf


@pytest.mark.parametrize(
    ("history", "metric", "message"),
    [
        ([{"step": 1, "grad_norm": 2.0}], "grad_norm", "nothing about single parameters"),
        ([], "grad_norm", "nothing about single parameters"),
        ([{"step": 1, "grad_norm/a": 1.0}], "lost_share", "metric='lost_share': allowed are grad_norm, "),
    ],
)
def test_refusals(history: list[dict[str, float]], metric: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.by_layer(history, metric)


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("draw", [plots.over_time, plots.ratio_map])
def test_pictures(draw: object, poisoned: bool, tmp_path: Path) -> None:
    run, history = Run(), []
    for _ in range(4):
        history.append(run.step(math.nan if poisoned and run.steps == 2 else None))
    if poisoned:  # and a layer that is dead
        history[0] |= {key: 0.0 for key in history[0] if key.startswith("update_norm/0")}
    assert callable(draw)
    figure = draw(history)
    if draw is plots.over_time:
        assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2, 3]
        drawn = figure.axes[3].lines[1]
        assert list(drawn.get_xdata()) == [1, 2, 3, 4]
        assert list(drawn.get_ydata()) == pytest.approx(
            plots.by_layer(history, "update_ratio")[1]["2"], nan_ok=True
        )
    else:
        (mesh,) = figure.axes[0].collections
        assert mesh.get_array().shape == (2, 4)
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "2"]
        # Layer 0 has NaN first; when its weights have, all have.
        unknown = [[poisoned, False, poisoned, poisoned], [False, False, False, poisoned]]
        assert np.ma.getmaskarray(mesh.get_array()).tolist() == unknown
    figure.savefig(tmp_path / "picture.png")
    assert draw([history[0]]) is not None  # one step is a picture too
