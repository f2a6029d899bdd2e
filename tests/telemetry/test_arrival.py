"""What comes from the GPU may be asked for by another thread than that which trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adamw_triton.step import statistics
from adamw_triton_kernels.statistics import WIDTH


def test_who_looks_while_another_one_finds_it_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.zeros(0, WIDTH + statistics.NUMBERS)
    arriving = statistics._Arriving(1, (), [table], ())
    others: list[Any] = []

    def look(event: Any, wait: bool) -> bool:
        if not others:
            others.append(None)
            others.append(arriving.arrived(wait))
        return True

    monkeypatch.setattr(statistics, "_is_here", look)
    found = arriving.arrived(wait=False)
    assert found is not None
    assert found.step == others[1].step == 1
    assert arriving.arrived(wait=False) is not None
