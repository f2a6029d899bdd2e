"""What a scrape of the endpoint gets, read by prometheus_client's own parser."""

from __future__ import annotations

import gc
import logging
import math
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import torch

prometheus_client: Any = pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

import adamw_triton
from adamw_triton import monitoring
from adamw_triton.installing import missing
from adamw_triton.monitoring import names
from adamw_triton.telemetry.observed import METRICS
from tests.monitoring.training import Run

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(optimizer: Any, **settings: Any) -> Callable[[], Series]:
    """Of a registry with its collector."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(monitoring.Collector(optimizer, **settings))
    return lambda: series(prometheus_client.generate_latest(registry).decode())


def series(text: str) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_number_arrives() -> None:
    run = Run(nonfinite="skip")
    stats = run.step()
    found = scrape(run.optimizer, per_param=True)()
    totals = {key: value for key, value in stats.items() if "/" not in key}
    assert set(totals) == {"step", *METRICS}
    for key, value in totals.items():
        assert found[names.TOTALS[key].name, ()] == value, key
    of_one = {key: value for key, value in stats.items() if "/" in key}
    assert len({key.partition("/")[2] for key in of_one}) == 4
    for key, value in of_one.items():
        metric, _, name = key.partition("/")
        assert found[names.OF_PARAMETERS[metric].name, (("parameter", name),)] == value, key
    for place in ("gpu", "host", "staging"):
        assert found[names.MEMORY.name, (("place", place),)] == run.optimizer.memory()[place]
    assert found[names.LEARNING_RATE.name, (("group", "0"),)] == 1e-2
    assert found[names.SKIPPED.name, ()] == found[names.SPILLS.name, ()] == 0
    assert len(found) == len(totals) + len(of_one) + 3 + 1 + 2 + 1  # and the info


def test_a_scrape_waits_for_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    stats = adamw_triton.AdamW.stats

    def noted(self: Any, **how: Any) -> dict[str, float]:
        waited.append(how["wait"])
        return stats(self, **how)

    monkeypatch.setattr(adamw_triton.AdamW, "stats", noted)
    run = Run()
    scrape(run.optimizer)()
    assert waited
    assert not any(waited)


def test_the_endpoint() -> None:
    run = Run()
    server, thread = monitoring.start_http_server(run.optimizer, 0)
    try:
        run.step()
        address = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.urlopen(address, timeout=10) as page:
            found = series(page.read().decode())
        assert found[names.STEP.name, ()] == 1
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_it_is_what_there_is_at_the_time() -> None:
    run = Run(nonfinite="skip")
    once = scrape(run.optimizer)
    before = once()
    assert names.STEP.name not in {name for name, _ in before}
    assert before[names.MEMORY.name, (("place", "host"),)] == 0
    for step in (1, 2):
        run.step()
        assert once()[names.STEP.name, ()] == step
    run.step(poison=math.nan)
    found = once()
    assert found[names.TOTALS["nan_count"].name, ()] == 1
    assert found[names.TOTALS["clip_coefficient"].name, ()] == 0
    assert math.isnan(found[names.TOTALS["grad_norm"].name, ()])
    assert found[names.SKIPPED.name, ()] == 1
    run.optimizer._spills = 3
    assert once()[names.SPILLS.name, ()] == 3


def test_the_plan_and_who_is_asked() -> None:
    run = Run(variant="auto")
    run.step()
    (labels,) = (labels for name, labels in scrape(run.optimizer)() if name == names.INFO.name)
    plan = run.optimizer.plan
    assert plan is not None
    assert plan.chosen is not None
    assert dict(labels) == {
        "variant": "auto", "chosen": plan.chosen.label, "version": adamw_triton.__version__
    }  # fmt: skip


def test_names_are_the_models_where_the_optimizer_has_none() -> None:
    run = Run()
    run.optimizer = adamw_triton.AdamW(run.model.parameters(), telemetry=True, variant="8bit")
    run.step()
    for model, expected in ((run.model, "0.weight"), (None, "0.0")):
        found = {
            dict(labels).get("parameter")
            for _, labels in scrape(run.optimizer, model=model, per_param=True)()
        }
        assert expected in found, found


@pytest.mark.parametrize("per_param", [False, True])
def test_series_are_bounded_and_what_is_cut_is_named_once(
    per_param: bool, caplog: pytest.LogCaptureFixture
) -> None:
    params = {f"layer{index}": torch.nn.Parameter(torch.ones(3)) for index in range(110)}
    optimizer = adamw_triton.AdamW([{"params": [each]} for each in params.items()], telemetry=True)

    def step(some: Any) -> None:
        optimizer.zero_grad()
        for name in some:
            params[name].grad = torch.ones(3)
        optimizer.step()

    once = scrape(optimizer, per_param=per_param, most_parameters=20)
    with caplog.at_level(logging.WARNING, "adamw_triton"):
        step(list(params)[100:])
        once()  # and these keep their series
        step(params)
        first, second = once(), once()
    assert first.keys() == second.keys()
    of_params = {
        dict(labels)["parameter"] for name, labels in first if name.startswith("adamw_triton_parameter_")
    }
    shown = {f"layer{index}" for index in (*range(10), *range(100, 110))}
    assert of_params == (shown if per_param else set())
    assert len([name for name, _ in first if name == names.LEARNING_RATE.name]) == 100
    assert len(first) < 20 * 17 + 150
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 + per_param
    cut = "20 parameters have series (most_parameters=20), and 90 have none: layer10, layer11, layer12, ..."
    assert (f"monitoring: {cut}" in messages) == per_param


def test_without_telemetry_there_is_the_rest_and_a_word_about_it(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(telemetry=False)
    run.step()
    with caplog.at_level(logging.WARNING, "adamw_triton"):
        found = {name for name, _ in scrape(run.optimizer)()}
    assert found == {
        each.name for each in (names.LEARNING_RATE, names.MEMORY, names.SKIPPED, names.SPILLS, names.INFO)
    }
    assert "telemetry is off" in caplog.text


def test_the_optimizer_is_not_kept_alive() -> None:
    run = Run()
    run.step()
    once = scrape(run.optimizer, model=run.model)
    assert once()
    del run
    gc.collect()
    assert once() == {}


@pytest.mark.parametrize("most", [0, -3])
def test_refusals(most: int) -> None:
    with pytest.raises(ValueError, match=rf"most_parameters={most}: allowed"):
        monitoring.Collector(Run().optimizer, most_parameters=most)


def test_one_registry_takes_one_optimizer() -> None:
    registry = prometheus_client.CollectorRegistry()
    registry.register(monitoring.Collector(Run().optimizer))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(monitoring.Collector(Run().optimizer))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ImportError, match=re.escape(missing("prometheus_client", "monitoring"))):
        monitoring.start_http_server(Run().optimizer, 0)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed")
def test_promtool_finds_nothing_to_say_against_the_names() -> None:
    run = Run(nonfinite="skip")
    run.step()
    registry = prometheus_client.CollectorRegistry()
    registry.register(monitoring.Collector(run.optimizer, per_param=True))
    text = prometheus_client.generate_latest(registry).decode()
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_scrapes_and_steps_at_the_same_time() -> None:
    """Whoever asks while numbers arrive gets those of one step."""
    run = Run()
    collector = monitoring.Collector(run.optimizer)
    ended, faults = threading.Event(), []
    seen: set[float] = set()

    def ask() -> None:
        last = 0.0
        while not ended.is_set():
            try:
                found = {family.name: family.samples for family in collector.collect()}
                if names.STEP.name in found:
                    step = found[names.STEP.name][0].value
                    assert step >= last
                    seen.add(last := step)
            except Exception as error:
                faults.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while run.steps < 150 and not faults:
            run.step()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not faults, faults
    assert len(seen) > 10
