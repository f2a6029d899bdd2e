"""A real Prometheus server, as Debian has it, scrapes a training run."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")
if shutil.which("prometheus") is None:
    pytest.skip("needs Debian's package prometheus", allow_module_level=True)

from adamw_triton import monitoring
from tests.monitoring.test_examples import FOLDER, QUERIES, plain
from tests.monitoring.training import Run

CONFIG = """
global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: training
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
PATIENCE = 30.0
"""Seconds, for a machine with other things to do."""

Ask = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def run() -> Run:
    return Run(nonfinite="skip")


@pytest.fixture
def ask(run: Run, tmp_path: Path) -> Iterator[Ask]:
    """``ask(query)``: what a server that scrapes this run has for it."""
    endpoint, thread = monitoring.start_http_server(run.optimizer, 0, per_param=True)
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.format(rules=FOLDER / "alerts.yml", port=endpoint.server_port))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=error",
        ]
    )

    def once(query: str) -> list[dict[str, Any]]:
        asked = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(asked, timeout=PATIENCE) as page:
            answer = json.load(page)
        assert answer["status"] == "success"
        return list(answer["data"]["result"])

    try:
        until(lambda: server.poll() is None and is_ready(address), "the server to start")
        yield once
    finally:
        server.terminate()
        server.wait(PATIENCE)
        endpoint.shutdown()
        endpoint.server_close()
        thread.join()


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=PATIENCE):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def until(condition: Callable[[], bool], what: str, between: Callable[[], object] = lambda: None) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        between()
        time.sleep(0.05)


def test_a_run_is_scraped_drawn_and_watched(run: Run, ask: Ask) -> None:
    # While it trains.
    def changed() -> bool:
        found = ask("changes(adamw_triton_step[1m])")
        return bool(found) and float(found[0]["value"][1]) >= 3

    until(changed, "three changes of the step", between=run.step)
    stats = run.step()

    def value(query: str) -> float:
        found = ask(query)
        return float(found[0]["value"][1]) if found else math.nan

    until(lambda: value("adamw_triton_step") == stats["step"], "the last step")
    assert value("adamw_triton_grad_norm") == stats["grad_norm"]
    of_one = value('adamw_triton_parameter_update_ratio{parameter="2.weight"}')
    assert of_one == stats["update_ratio/2.weight"]
    assert value("up") == 1

    # What a dashboard draws: all but the alerts, of which there are none.
    empty = [query for query in QUERIES if not ask(plain(query))]
    assert [query for query in empty if "ALERTS" not in query] == []
    assert not ask("ALERTS")

    # NaN in a batch is a reason to call somebody.
    run.step(poison=math.nan)
    firing = 'ALERTS{alertname="AdamWNotFinite", alertstate="firing", severity="critical"}'
    until(lambda: bool(ask(firing)), "the alert")
    assert value("adamw_triton_nan_elements") == 1
    until(lambda: value("adamw_triton_skipped_steps_total") == 1, "the skipped step")
