from collections.abc import Iterator

import pytest

from adamw_triton_kernels import fusion


@pytest.fixture(autouse=True)
def backend(as_asked: bool) -> str:
    """The interpreter stays on: these tests are about the kernels."""
    return "triton"


@pytest.fixture
def counter() -> Iterator[None]:
    """What decides about compiling: each test's own; the module's is put back."""
    before = vars(fusion._Work).copy()
    fusion._Work.done, fusion._Work.refused = 0, False
    yield
    fusion._Work.done, fusion._Work.refused = before["done"], before["refused"]
