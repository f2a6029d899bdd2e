"""The kernels and their launch with other versions of Triton.

``.ci/run`` installs each into a folder of its own and names the folders in ``ADAMW_TRITON_TRITONS``, with
``:`` between them. Here each is put in front of what is installed. With none named, that is tried.
"""

from __future__ import annotations

import os

import pytest

from tests.kernels import stub

FOLDERS = os.environ.get("ADAMW_TRITON_TRITONS", "").split(os.pathsep)
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("folder", FOLDERS, ids=os.path.basename)
def test_kernels_compile_for_every_target_and_are_launched(folder: str, target: str) -> None:
    """For the oldest GPUs with every dtype of parameters: there bf16 is what a compiler may lack."""
    if not stub.report(stub.can_link, target, before=folder)["found"]:
        pytest.skip("this Triton takes AMD's linker from ROCm, which is not here")
    dtypes = ("bfloat16", "float16", "float32") if target == "sm_75" else ("bfloat16",)
    found = stub.report(stub.compiled, target, *dtypes, before=folder)
    assert found["triton"].startswith(os.path.basename(folder).removeprefix("triton-").removesuffix("newest"))
    assert found["launches"] == 2 * len(dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_32bit", "adamw_8bit"])
@pytest.mark.parametrize("folder", FOLDERS, ids=os.path.basename)
def test_the_launcher_is_given_what_the_kernel_takes(folder: str, name: str) -> None:
    found = stub.report(stub.launched, "sm_90", name, before=folder)
    assert all(found.values()), found
    assert found["compiled, loaded"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=os.path.basename)
def test_what_fails_to_compile_or_load_leaves_all_as_it_was(folder: str) -> None:
    assert stub.report(stub.failing, "sm_90", before=folder) == {"found": [[0, 2]] * 6}
