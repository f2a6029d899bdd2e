"""Runs that several tests look at."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What ``make`` returns, given a folder to write in. Made once, also where pytest-xdist gives the tests
    to several processes: starting ranks takes longer than all they do. They see no GPUs."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    made = folder / "made"
    with pytest.MonkeyPatch.context() as patch, open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            patch.delenv("TRITON_INTERPRET", raising=False)  # tests/conftest.py does so later, for one test
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            torch.save(make(folder), made)
    return torch.load(made, weights_only=False)
