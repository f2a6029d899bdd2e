"""A report as text, as a rich table, as HTML, as a dict."""

from __future__ import annotations

import io
import json

import pytest

from adamw_triton.telemetry.diagnosis import RULES, diagnose
from adamw_triton.telemetry.report import WIDTH, Report
from tests.telemetry.planted import NAMES, history
from tests.telemetry.test_diagnosis import LED, SICK

PLANTS = {**{name: sick.plant for name, sick in SICK.items()}, **{name: led[0] for name, led in LED.items()}}
REPORTS: dict[str, Report] = {
    "nothing seen": diagnose([]),
    "few steps": diagnose(history(3)),
    "healthy": diagnose(history(35)),
    **{name: diagnose(history(35, plant)) for name, plant in PLANTS.items()},
}


def squeezed(text: str) -> str:
    """Without what lines are broken and drawn with."""
    return "".join(char for char in text if not char.isspace())


@pytest.mark.parametrize("name", REPORTS)
def test_text(name: str) -> None:
    report = REPORTS[name]
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith(("Nothing", "Healthy", f"{len(report.findings)} thing"))
    for finding in report.findings:
        for part in (finding.title, finding.measured, finding.where, finding.cause, finding.remedy):
            assert squeezed(part) in squeezed(str(report))
        for effect in finding.led_to:
            assert squeezed(effect.seen) in squeezed(str(report))


def test_what_it_looks_like() -> None:
    report = diagnose(history(35, PLANTS["NaN after too large steps"]))
    assert str(report) == (
        "1 thing stands out in 35 steps seen (1 to 35).\n"
        "\n"
        "1. The learning rate is too high, since step 15\n"
        "   update_ratio 0.499, lr 0.001\n"
        "   Likely: Within five steps, updates moved the weights as far as these are\n"
        "   long, where by rule of thumb a step moves them by a thousandth; or weights\n"
        "   have grown until decay alone holds them.\n"
        "   Try: A tenth to a hundredth of the lr, and a warm-up.\n"
        "   Led to: Gradients are NaN or infinite, since step 30: nan_count 98, inf_count\n"
        "   0, steps 6, of them skipped 0"
    )


def test_names_are_few_in_text_and_all_in_the_finding() -> None:
    finding = diagnose(history(35, PLANTS["all is lost"])).findings[0]
    assert len(finding.tensors) == len(NAMES)
    assert finding.where.count(",") == 2
    assert finding.where.endswith(f"and {len(NAMES) - 3} more")


@pytest.mark.parametrize("name", REPORTS)
def test_dict_is_json(name: str) -> None:
    found = json.loads(json.dumps(REPORTS[name].to_dict()))
    assert found["healthy"] == REPORTS[name].healthy
    assert [each["kind"] for each in found["findings"]] == [each.kind for each in REPORTS[name].findings]


@pytest.mark.parametrize("name", REPORTS)
def test_rich(name: str) -> None:
    rich = pytest.importorskip("rich.console")
    for width in (60, 160):
        console = rich.Console(width=width, record=True, file=io.StringIO())
        console.print(REPORTS[name])
        drawn = console.export_text()
        assert all(len(line) <= width for line in drawn.splitlines())
        assert squeezed(REPORTS[name].title) in squeezed(drawn)
        assert "…" not in drawn


def test_html_escapes_names() -> None:
    strange = {name: f"<b>{name}</b>" for name in NAMES}
    report = diagnose(history(35, PLANTS["a tensor is dead"]), names=strange)
    drawn = report._repr_html_()
    assert "<b>blocks" not in drawn
    assert "&lt;b&gt;blocks" in drawn
    assert RULES["dead"].title in drawn


def test_notes() -> None:
    assert "takes 10 steps to show" in str(REPORTS["few steps"])
    assert "takes 10 steps to show" not in str(REPORTS["healthy"])
    idle = diagnose(history(35, lambda step, name: None if "mlp" in name else {}))
    assert idle.healthy
    assert idle.notes == ("Parameters without a gradient in any of these steps, as if frozen: 4.",)
