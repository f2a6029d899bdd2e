"""`adamw-triton doctor`: what it prints, and its exit codes."""

from __future__ import annotations

import sys

import pytest

from adamw_triton.cli import main
from adamw_triton.commands.doctor import conclude, show
from adamw_triton.doctor import OK, PROBLEM, SKIPPED, WARNING, Finding
from adamw_triton.doctor import machine as real
from tests.doctor.test_checks import CPU_ONLY, Fake

FINE, CAREFUL, BAD, LEFT = (Finding(verdict, "text") for verdict in (OK, WARNING, PROBLEM, SKIPPED))


@pytest.mark.parametrize(
    ("findings", "has_gpu", "code", "words"),
    [
        ([FINE, FINE], True, 0, "All works."),
        ([FINE, CAREFUL], True, 0, "All works, with 1 warning."),
        ([CAREFUL, CAREFUL], True, 0, "All works, with 2 warnings."),
        ([FINE, BAD], True, 1, "does not work here: see the problems above"),
        ([FINE, LEFT], False, 3, "There is no GPU here: nothing could be said of one."),
        ([CAREFUL, LEFT], False, 3, "There is no GPU here"),
        ([BAD, LEFT], False, 1, "does not work here"),
    ],
)
def test_exit_codes(
    findings: list[Finding], has_gpu: bool, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conclude(findings, has_gpu=has_gpu) == code
    assert words in capsys.readouterr().out


def test_lines_are_aligned_and_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    findings = [("GPU", Finding(WARNING, "word " * 20, "advice " * 12)), ("link", FINE)]
    assert show(findings) == [finding for _, finding in findings]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning  GPU      word word")
    assert lines[1].startswith(" " * 18 + "word")
    assert any(line.startswith(" " * 18 + "-> advice") for line in lines)
    assert lines[-1] == "ok       link     text"
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_verdicts_have_colours_in_a_terminal(
    terminal: bool,
    environment: dict[str, str],
    coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show([("torch", FINE), ("link", BAD)])
    lines = capsys.readouterr().out.splitlines()
    if coloured:
        assert lines == ["\033[32mok       \033[0mtorch    text", "\033[31mproblem  \033[0mlink     text"]
    else:
        assert lines == ["ok       torch    text", "problem  link     text"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [({}, 0), ({"wsl": True}, 0), ({"paging_answer": "no"}, 1), (CPU_ONLY, 3), ({"gpu": None}, 1)],
)
def test_the_command(
    changes: dict[str, object], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "Machine", lambda: Fake(**changes))
    assert main(["doctor"]) == code
    output = capsys.readouterr()
    assert len([line for line in output.out.splitlines() if not line.startswith(" ")]) == 10
    assert output.err == ""


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "exit code: 0 all works (with or without warnings), 1 kernels or paging cannot work" in text
    assert "3 there is no GPU" in text
