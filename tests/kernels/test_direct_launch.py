"""The compiled kernel, called directly: what Triton's launcher is given, on a device that is not there."""

from __future__ import annotations

import pytest

from tests.kernels import stub


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["adamw_32bit", "adamw_8bit"])
def test_the_launcher_is_given_what_the_kernel_takes(name: str, target: str) -> None:
    """The same compiled kernel, whatever the size of its arrays: it was promised nothing of that."""
    found = stub.report(stub.launched, target, name)
    assert found.pop("launches") == 2
    assert found.pop("compiled, loaded") == 3  # a compilation, a launcher, machine code
    assert found.pop("programs") == {"adamw_32bit": 3, "adamw_8bit": 5}[name]
    assert all(found.values()), found


@pytest.mark.slow
def test_a_kernel_that_fails_to_compile_or_load_leaves_all_as_it_was() -> None:
    """Two kernels: neither is launched before both are there, and the next step launches both."""
    assert stub.report(stub.failing, "sm_90") == {"found": [[0, 2]] * 6}
