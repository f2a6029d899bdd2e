"""`adamw-triton doctor`: what this machine has, what it can reach, and what to do about it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable

from adamw_triton.doctor import OK, PROBLEM, SKIPPED, WARNING, Finding

COLOURS = {OK: 32, WARNING: 33, PROBLEM: 31, SKIPPED: 2}
"""ANSI's: green, yellow, red, faint."""
CANNOT_WORK = 1
NO_GPU = 3

SUMMARY = "check GPU, driver, Triton, memory, pinning and the host link; say what to do about each"
EPILOG = """\
exit code: 0 all works (with or without warnings), 1 kernels or paging cannot work on the GPU that is here,
3 there is no GPU"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-command `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=doctor)


def doctor(_: argparse.Namespace) -> int:
    """Print a line for each check as it is done; the exit code."""
    from adamw_triton.doctor.checks import examine
    from adamw_triton.doctor.machine import Machine

    machine = Machine()
    return conclude(show(examine(machine)), has_gpu=machine.gpu is not None)


def show(findings: Iterable[tuple[str, Finding]]) -> list[Finding]:
    """Print them; what they were."""
    width = max(60, min(120, shutil.get_terminal_size().columns))
    shown = []
    for name, finding in findings:
        head = f"{finding.verdict:<9}{name:<9}"
        lines = textwrap.fill(finding.text, width, initial_indent=head, subsequent_indent=" " * len(head))
        print(coloured(lines[:9], COLOURS[finding.verdict]) + lines[9:])
        if finding.advice:
            arrow = f"{'':<18}-> "
            print(
                textwrap.fill(finding.advice, width, initial_indent=arrow, subsequent_indent=" " * len(arrow))
            )
        shown.append(finding)
    return shown


def coloured(text: str, code: int) -> str:
    """In a terminal that takes colours, unless NO_COLOR asks for none (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"


def conclude(findings: Iterable[Finding], *, has_gpu: bool) -> int:
    """Print what it comes to; the exit code."""
    verdicts = [finding.verdict for finding in findings]
    if PROBLEM in verdicts:
        print("Something that adamw_triton needs does not work here: see the problems above.")
        return CANNOT_WORK
    if not has_gpu:
        print("There is no GPU here: nothing could be said of one.")
        return NO_GPU
    warnings = verdicts.count(WARNING)
    print("All works." if not warnings else f"All works, with {warnings} warning{'s' * (warnings > 1)}.")
    return 0
