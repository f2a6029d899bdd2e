"""Statistics as lines of JSON, there and back."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamw_triton.monitoring import JsonLines, grouped, read_json_lines
from tests.monitoring.training import Run

NUMBERS = st.dictionaries(st.text().filter("step".__ne__), st.floats(), min_size=1)


def bits(numbers: dict[str, float]) -> dict[str, bytes]:
    return {key: b"nan" if math.isnan(value) else struct.pack("d", value) for key, value in numbers.items()}


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(NUMBERS))
def test_what_was_written_is_read(rows: list[dict[str, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stats.jsonl"
        with JsonLines(path) as lines:
            for row in rows:
                lines.write(row)
        assert list(map(bits, read_json_lines(path))) == list(map(bits, rows))


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def test_of_a_run(tmp_path: Path) -> None:
    """Step by step, where every second one is looked at; strict JSON, whatever it is."""
    run, path = Run(telemetry=2), tmp_path / "stats.jsonl"
    lines, expected = JsonLines(path), []
    for poison in (None, None, None, math.inf):
        stats = run.step(poison)
        lines.write(stats, loss=0.5)
        if run.steps % 2 == 0:
            expected.append({**stats, "loss": 0.5})
        # At once: whoever looks has it.
        assert list(map(bits, read_json_lines(path))) == list(map(bits, expected))
    assert not math.isfinite(expected[1]["grad_norm"])
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    with JsonLines(path) as again:
        again.write({"step": 5.0})
    assert [row["step"] for row in read_json_lines(path)] == [2, 4, 5]
    lines.close()


def test_half_a_line_at_the_end_is_left_out_and_one_before_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text('{"step": 1.0}\n{"step": 2')
    assert read_json_lines(path) == [{"step": 1.0}]
    for wrong in ('{"step": 2', "[1]", '{"step": "two"}', ""):
        path.write_text(f'{{"step": 1.0}}\n{wrong}\n{{"step": 3.0}}\n')
        with pytest.raises(ValueError, match=r"line 2 of .*stats\.jsonl is no JSON object of numbers"):
            read_json_lines(path)


def test_groups() -> None:
    stats = Run().step()
    named = grouped(stats)
    assert named["optim/grad_norm"] == stats["grad_norm"]
    assert named["optim_grad_norm/0.weight"] == stats["grad_norm/0.weight"]
    assert len(named) == len(stats)
    folders = {key.rpartition("/")[0] for key in named}
    assert not folders & named.keys()  # MLflow's files
    assert grouped({"step": 1.0}, "generator") == {"generator/step": 1.0}
