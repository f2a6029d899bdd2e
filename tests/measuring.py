"""What takes memory: scripts that measure their own, each in a process of its own; buffers for staging."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def printed(script: str, *arguments: object) -> str:
    """What the script prints. It imports what the tests import, and what it frees goes back to the system
    at once: glibc would keep blocks of up to 32 MiB, how many of them depends on which threads freed them."""
    code = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n" + script
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def staging(optimizer: Any) -> int:
    """Bytes that pages pass through; of CPU tensors too, where ``memory()`` calls them none of a GPU's."""
    sums = optimizer._places.sums
    pagers = [*optimizer._store._pagers.values(), *([] if sums is None else sums._pagers.values())]
    return sum(pager.staging_bytes for pager in pagers)
