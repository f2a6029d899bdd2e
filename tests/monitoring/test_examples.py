"""The dashboard and the alerts: whether they ask for what there is, and whether Prometheus takes them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from adamw_triton.monitoring import names
from examples.monitoring import dashboard

FOLDER = dashboard.FILE.parent
NAMES = {metric.name for metric in names.METRICS}
FILES = ("dashboard.json", "alerts.yml", "alerts_test.yml", "README.md", "prometheus.yml")
PANELS: list[dict[str, Any]] = json.loads(dashboard.FILE.read_text())["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: .ci/prometheus, or Debian's package prometheus"
)


def plain(query: str) -> str:
    """Without what Grafana puts in."""
    return re.sub(r"\$\w+", ".*", query)


def promtool(*arguments: str, cwd: Path = FOLDER) -> None:
    run = subprocess.run(
        ["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_file_is_what_the_script_makes() -> None:
    assert dashboard.FILE.read_text() == dashboard.text(), "run examples/monitoring/dashboard.py"


@pytest.mark.parametrize("file", FILES)
def test_only_what_is_exported_is_asked_for(file: str) -> None:
    found = set(re.findall(r"\badamw_triton_[a-z]\w*", (FOLDER / file).read_text()))
    assert found <= NAMES
    if file == "dashboard.json":
        assert found == NAMES  # and nothing is left out


def test_every_alert_has_a_test_in_which_it_fires_and_a_word_about_what_to_do() -> None:
    text = (FOLDER / "alerts.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", text)
    assert len(alerts) == text.count("description:") == text.count("summary:") == text.count("severity:")
    tests = (FOLDER / "alerts_test.yml").read_text().partition("- name: NaN among")[2]
    assert not [alert for alert in alerts if alert not in tests]


def test_panels_stand_side_by_side() -> None:
    cells = [
        (place["x"] + dx, place["y"] + dy)
        for place in (panel["gridPos"] for panel in PANELS)
        for dx in range(place["w"])
        for dy in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < dashboard.COLUMNS
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


@needs_promtool
def test_promtool_takes_the_rules_and_their_tests() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")
    promtool("check", "config", "prometheus.yml")


@needs_promtool
def test_promtool_can_read_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{index}", "expr": plain(query)} for index, query in enumerate(QUERIES)]
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", "queries.yml", cwd=tmp_path)
