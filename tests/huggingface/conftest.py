from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="package", autouse=True)
def _lighter_collections() -> None:
    """accelerate collects garbage when it frees memory, twice a training: half of a test's time goes
    into looking through what transformers has imported, unless that is set aside."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask the network."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
