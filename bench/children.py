"""Processes that are given so many seconds: asked to stop when they are over, and made to soon after."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
GRACE = 8.0
"""Seconds between the interrupt, upon which pytest writes its report, and the end."""


def environment(first: Sequence[Path] = (), **variables: str) -> dict[str, str]:
    """Ours for a child: ``first``, then this checkout before what is installed; Triton compiles."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [*map(str, first), str(ROOT), str(ROOT / "kernels"), inherited.get("PYTHONPATH", "")]
    return {**inherited, **variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start(command: Sequence[str], env: dict[str, str], log: IO[Any] | None = None) -> subprocess.Popen[bytes]:
    """In a group of its own, with all that it starts; its output to ``log``, else to ours."""
    options: dict[str, Any] = {} if log is None else {"stdout": log, "stderr": subprocess.STDOUT}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` leaves it: it could not be asked
        options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options |= {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **options)


def finish(process: subprocess.Popen[bytes], seconds: float | None) -> int | None:
    """Its exit status; None if it had to be stopped. Nothing of its group is left, and if we are interrupted
    ourselves, at once."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        kill(process)


def run(
    command: Sequence[str], seconds: float | None, env: dict[str, str], log: IO[Any] | None = None
) -> int | None:
    """``start`` and ``finish``."""
    return finish(start(command, env, log), seconds)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever is left of its group."""
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
