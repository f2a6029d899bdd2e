"""The audit's rows as tables on the terminal, and as `audit.md` and `audit.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from triton import knobs

from bench import report
from bench.compiled.work import Work
from bench.compiled.work import table as work_table
from bench.machine_code.account import Account
from bench.machine_code.cases import Row
from bench.report import Cell, Table

VENDORS = {"NVIDIA": "sm_", "AMD": "gfx"}
READING = (
    "Compiled, not run. Machine instructions per element on the path of a full tile, and in brackets"
    " registers per thread."
)

_DETAILS: dict[str, Callable[[Account], str]] = {
    "instructions/element": lambda a: f"{a.per_element:.1f}",
    "loads": lambda a: _accesses(a, "load"),
    "stores": lambda a: _accesses(a, "store"),
    "bytes/element": lambda a: " + ".join(f"{size:.2f}" for size in a.bytes_per_element.values()),
    "registers": lambda a: str(a.registers),
    "spilled bytes": lambda a: str(sum(a.spill_bytes.values())),
    "shared bytes": lambda a: str(a.shared_bytes),
    "barriers": lambda a: str(a.barriers),
}


def _accesses(account: Account, kind: str) -> str:
    accesses = sorted(account.accesses.items())
    return " ".join(f"{count}x{width}" for (of, width), count in accesses if of == kind)


def show(rows: Sequence[Row], console: Console, counted: Sequence[Work] = ()) -> None:
    """Draw a table per vendor, say of each case that misses a goal what it misses, and what was counted."""
    for table in [*_matrices(rows), *([work_table(counted)] if counted else [])]:
        report.show(table, console)


def write(rows: Sequence[Row], folder: Path, counted: Sequence[Work] = ()) -> None:
    """Write `audit.json`, every figure, and `audit.md`, the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    provenance = _provenance()
    record = {**provenance, "rows": [_record(row) for row in rows], "work": [asdict(one) for one in counted]}
    (folder / "audit.json").write_text(json.dumps(record, indent=1) + "\n")
    used = ", ".join(f"{name} {value}" for name, value in provenance["versions"].items())
    head = (
        f"# Machine code of the kernels\n\nBy `python -m bench audit`, {provenance['date']}, with {used}:"
        " compiled, not run. What is counted is defined in `bench/machine_code/account.py`.\n"
    )
    tables = [*_matrices(rows), *([work_table(counted)] if counted else []), *_details(rows)]
    (folder / "audit.md").write_text("\n".join([head, *map(report.markdown, tables)]))


def _provenance() -> dict[str, Any]:
    ptxas = {"ptxas": knobs.nvidia.ptxas, "ptxas for sm_100": knobs.nvidia.ptxas_blackwell}
    packages = {name: version(name) for name in ("triton", "flashoptim")}
    return {
        "note": "compiled, not run",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {**packages, **{name: _release(tool.version) for name, tool in ptxas.items()}},
    }


def _release(text: str) -> str:
    """`12.8.93` out of all that ptxas says of itself."""
    match = re.search(r"V?(\d+\.\d[\d.]*)", text)
    if match is None:
        raise ValueError(f"no version in {text!r}")
    return match[1]


def _matrices(rows: Sequence[Row]) -> list[Table]:
    """For each vendor, kernels and types down, targets across."""
    groups = [
        (vendor, [row for row in rows if row.case.target.startswith(prefix)])
        for vendor, prefix in VENDORS.items()
    ]
    return [_matrix(vendor, group) for vendor, group in groups if group]


def _matrix(vendor: str, rows: Sequence[Row]) -> Table:
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(row.case.label, {})[row.case.target] = row
    targets = list(dict.fromkeys(row.case.target for row in rows))
    body: list[list[Cell | str]] = [
        [label, *(_cell(line[target]) for target in targets), _verdict(line)] for label, line in lines.items()
    ]
    notes = [f"{row.case.target} {row.case.label}: {row.verdict}" for row in rows if row.missed]
    return Table(vendor, ["kernel, params/grads", *targets, "verdict"], body, [READING, *notes])


def _cell(row: Row) -> Cell:
    text = "failed" if row.account is None else f"{row.account.per_element:.1f} ({row.account.registers})"
    return Cell(text, "bad" if row.missed else "")


def _verdict(line: Mapping[str, Row]) -> Cell:
    """`ok`, `peer`, or how many targets miss."""
    missed = sum(row.missed for row in line.values())
    return Cell(f"{missed} missed", "bad") if missed else Cell(next(iter(line.values())).verdict)


def _details(rows: Sequence[Row]) -> list[Table]:
    """For each target, every figure."""
    columns = ["kernel, params/grads", *_DETAILS, "to move", "verdict"]
    notes = [
        "Accesses: of one thread, count x bits. Bytes: what all threads ask for, loads + stores; a block's"
        " scales more than once. To move: once."
    ]
    return [
        Table(target, columns, [_detail(row) for row in rows if row.case.target == target], notes)
        for target in dict.fromkeys(row.case.target for row in rows)
    ]


def _detail(row: Row) -> list[Cell | str]:
    figures = ["" if row.account is None else figure(row.account) for figure in _DETAILS.values()]
    return [row.case.label, *figures, f"{row.to_move:.2f}", Cell(row.verdict, "bad" if row.missed else "")]


def _record(row: Row) -> dict[str, Any]:
    case, account = row.case, row.account
    record = {
        "kernel": case.kernel,
        "params": case.params,
        "grads": case.grads,
        "target": case.target,
        "bytes_to_move": row.to_move,
        "verdict": row.verdict,
    }
    if account is None:
        return record
    return {
        **record,
        "instructions_per_element": account.per_element,
        "instructions": account.instructions,
        "threads": account.threads,
        "elements": account.elements,
        "accesses": {f"{kind}{width}": count for (kind, width), count in sorted(account.accesses.items())},
        "bytes_per_element": account.bytes_per_element,
        "registers": account.registers,
        "spill_bytes": account.spill_bytes,
        "spill_accesses": sum(account.spills.values()),
        "spilled_registers": account.spilled_registers,
        "stack_bytes": account.stack_bytes,
        "shared_bytes": account.shared_bytes,
        "barriers": account.barriers,
        "flags": list(account.flags),
    }
