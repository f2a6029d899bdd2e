"""What a visitor meets first stays what can be read in a minute. Its blocks run in tests/docs."""

from __future__ import annotations

from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_it_is_short() -> None:
    assert README.count("\n") < 120


def test_it_has_the_line_that_ci_runs_and_the_demo() -> None:
    assert README.partition("<!-- tests -->\n```sh\n")[2].startswith(
        'pip install -e ".[test]" && python -m pytest -n auto\n```'
    )
    assert '\npip install ".[demo]" && adamw-triton demo\n' in README
