import pytest


@pytest.fixture(autouse=True)
def backend() -> str:
    """The interpreter stays on: these tests are about the kernels."""
    return "triton"
