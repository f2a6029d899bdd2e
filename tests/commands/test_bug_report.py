"""`adamw-triton bug-report`: whole, whatever the machine is like, and nothing in it that nobody asked for."""

from __future__ import annotations

import importlib.metadata

import pytest

import adamw_triton
from adamw_triton.cli import main
from adamw_triton.doctor import machine as real
from adamw_triton.doctor.checks import CHECKS
from tests.doctor.test_checks import CPU_ONLY, Fake


@pytest.mark.parametrize("changes", [{}, CPU_ONLY, {"paging_answer": OSError("broken")}])
def test_a_report_is_whole(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "Machine", lambda: Fake(**changes))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert main(["bug-report"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for part in ("### What happened", "### How to see it", "print(optimizer.plan)", "### Where"):
        assert part in output.out
    assert f"- adamw_triton {adamw_triton.__version__}, Python " in output.out
    assert f"torch {importlib.metadata.version('torch')}" in output.out
    assert "CUDA_VISIBLE_DEVICES=3" in output.out
    assert "secret" not in output.out
    _, findings, after = output.out.split("```")
    assert [line.split()[1] for line in findings.splitlines() if line[:1].strip()] == list(CHECKS)
    assert "Read it before you send it" in after
