"""Which transformers a run of the tests is about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")


def test_it_is_the_one_that_was_asked_for() -> None:
    expected = os.environ.get("ADAMW_TRITON_EXPECTED")
    where = Path(transformers.__file__)
    assert expected is None or where.is_relative_to(Path(expected).resolve()), where
    print(f"transformers {transformers.__version__}")
