"""The audit's verdicts, on accounts made by hand. Nothing is compiled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bench.machine_code.account import TARGETS, Account

audit = pytest.importorskip("bench.suites.audit", reason="the audit stands us beside flashoptim")


def test_the_widest_accesses_that_a_thread_can_make():
    # 16 elements of bf16 and of 8-bit codes: two accesses and one, full width; of 8 codes only 64 bits.
    assert audit.widest_accesses([16], [16, 8], 16) == Counter({("load", 128): 3, ("store", 128): 2})
    assert audit.widest_accesses([8], [], 8) == Counter({("store", 64): 1})


def test_the_audit_sees_what_misses_a_goal():
    def misses(goal=60.0, **figures: Any) -> list[str]:
        good = {
            "target": TARGETS["sm_90"], "elements": 2048, "threads": 128, "instructions": 960,
            "accesses": Counter({("load", 128): 4, ("store", 128): 2}), "barriers": 0, "registers": 72,
            "stack_bytes": 0, "shared_bytes": 0, "spilled_registers": 0, "spills": Counter(), "flags": (),
        }  # fmt: skip
        wanted = {("load", 128): 4, ("store", 128): 2}
        return list(audit._misses(Account(**{**good, **figures}), goal, wanted))

    assert misses() == []
    assert misses(instructions=961) == ["60.1 instructions/element, goal 60"]
    assert misses(None, instructions=9999) == []
    assert len(misses(spills=Counter({("load", 32): 1}))) == 1
    assert len(misses(stack_bytes=8)) == 1
    assert len(misses(accesses=Counter({("load", 128): 3, ("load", 64): 2, ("store", 128): 2}))) == 1
    assert misses(accesses=Counter({("load", 256): 2, ("store", 128): 2})) == []  # wider is no fault
    assert misses(flags=("1 atomics",)) == ["1 atomics"]


def test_every_kernel_meets_every_target_with_the_types_it_has():
    cases = audit.cases()
    ours = 4
    assert len(cases) == len(set(cases)) == 10 * (ours * 4 + ours * 3 + ours * 4 + 4 + 2)
    assert {case.target for case in cases} == set(TARGETS)
    assert {case.params for case in cases if case.kernel.endswith(" remainder")} == {"bf16"}
    assert {case.params for case in cases if case.kernel.endswith(" master")} == {"fp16"}


@pytest.mark.parametrize(
    ("kernel", "dtype", "size"),
    [
        ("32bit", "bf16", 22), ("32bit stochastic", "bf16", 22), ("32bit remainder", "bf16", 26),
        ("32bit amsgrad remainder", "bf16", 34), ("32bit master", "fp16", 30),
        ("8bit block 128", "bf16", 10.0625), ("8bit block 128 remainder", "bf16", 14.0625),
        ("8bit block 256 master", "fp16", 18.03125), ("flashoptim 8bit corrected", "bf16", 12.25),
    ],
)  # fmt: skip
def test_bytes_that_an_element_has_to_move(kernel: str, dtype: str, size: float):
    assert audit.KERNELS[kernel].moves(audit.DTYPES[dtype], audit.DTYPES[dtype]) == size


@pytest.mark.parametrize("more", [8, 9])
def test_weights_kept_otherwise_may_cost_so_many_instructions_more(monkeypatch, more: int):
    wanted = audit.widest_accesses([16, 32, 32, 16], [16, 32, 32, 16, 16], 8)

    def count(case: Any) -> Account:
        instructions = 8 * (20 + more * case.kernel.endswith("remainder"))
        figures = dict.fromkeys(("barriers", "stack_bytes", "shared_bytes", "spilled_registers"), 0)
        made = {"instructions": instructions, "accesses": wanted, "registers": 72, "spills": Counter()}
        return Account(TARGETS["sm_90"], 1024, 128, flags=(), **made, **figures)

    monkeypatch.setattr(audit, "count", count)
    row = audit.audit(audit.Case("32bit remainder", "bf16", "bf16", "sm_90"))
    assert row.judged
    assert row.misses == (() if more == 8 else ("29.0 instructions/element, goal 28",))


def test_a_case_that_cannot_be_compiled_is_a_row_that_says_why(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such register\nand more")

    monkeypatch.setattr(audit, "compile_for", refuse)
    ours, peer = (audit.audit(audit.Case(k, "bf16", "bf16", "sm_90")) for k in ("32bit", "flashoptim 8bit"))
    assert ours.verdict == peer.verdict == "RuntimeError: no such register"
    assert ours.missed
    assert not peer.missed


def test_under_the_interpreter_the_audit_refuses(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert audit.main(["--quick"]) == 2
    assert "unset it" in capsys.readouterr().err
