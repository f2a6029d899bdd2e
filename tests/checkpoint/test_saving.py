"""What a state_dict costs in memory and on disk, and who can read it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from tests.checkpoint import release_0
from tests.measuring import printed
from tests.optimizer.problems import bits, parameters, saved, state_bits, train

VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")
LAYER = [(256, 256)] * 4 + [(688, 256)] * 3 + [(256,)] * 2
LORA = [(8, 4096), (4096, 8)] * 24
ROOT = Path(__file__).resolve().parents[2]


def file_bytes(state_dict: dict[str, Any]) -> int:
    file = io.BytesIO()
    torch.save(state_dict, file)
    return len(file.getvalue())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for entry in optimizer.state.values() for t in entry.values())


@pytest.mark.parametrize("shapes", [LAYER * 2, LORA, [(1000, 999)]], ids=["layers", "LoRA", "one"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_files_are_within_1_percent_of_the_state(variant: str, shapes: list[tuple[int, ...]]) -> None:
    optimizer = AdamW(parameters(shapes), variant=variant)
    train(optimizer, 1)
    assert file_bytes(optimizer.state_dict()) <= 1.01 * state_bytes(optimizer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_part_of_the_state_is_saved_without_the_rest(variant: str) -> None:
    """State that nobody has yet, and what a tool has filtered out, take no room in a file."""
    params = parameters([(512, 1024)] * 4)
    for param in params[:2]:
        param.grad = torch.ones_like(param)
    optimizer = AdamW(params, variant=variant)
    optimizer.step()
    assert len(optimizer.state) == 2
    assert file_bytes(optimizer.state_dict()) <= 1.01 * state_bytes(optimizer)
    state_dict = optimizer.state_dict()
    del state_dict["state"][0]
    assert file_bytes(state_dict) <= 1.01 * state_bytes(optimizer) / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_native_state_is_a_view_of_the_live_one(variant: str) -> None:
    optimizer = AdamW(parameters(), variant=variant)
    train(optimizer, 1)
    for shown, live in zip(optimizer.state_dict()["state"].values(), optimizer.state.values(), strict=True):
        assert {k: v.data_ptr() for k, v in shown.items()} == {k: v.data_ptr() for k, v in live.items()}


def test_the_form_is_that_of_shards() -> None:
    """Whose scales are rows and whose remainders are pairs of bytes. In memory of another order blocks are of
    no rows. The form of before, flat and in 16 bits, is read as well."""
    shapes = {(64, 256): (64, 2), (8, 2, 512): (8, 8), (70, 70): (39,), (5000,): (40,), (3,): None, (): None}
    params = parameters([*shapes], torch.bfloat16)
    params.append(Parameter(torch.ones(256, 128, dtype=torch.bfloat16).T))
    optimizer = AdamW(params, variant="8bit", master_weights=True)
    train(optimizer, 2)
    state_dict = saved(optimizer)
    entries = state_dict["state"].values()
    for entry, param, rows in zip(entries, params, [*shapes.values(), (256,)], strict=True):
        assert entry["remainder"].dtype is torch.uint8
        assert entry["remainder"].shape == (*param.shape, 2)
        for key in ("exp_avg_scales", "exp_avg_sq_scales") if rows else ():
            assert entry[key].shape == rows
    for before in (False, True):
        if before:
            for entry, live in zip(entries, optimizer.state.values(), strict=True):
                entry |= {key: live[key] for key in live if key == "remainder" or "scales" in key}
            assert {entry["remainder"].dtype for entry in entries} == {torch.int16}
        twin = AdamW([Parameter(p.detach().clone()) for p in params], variant="8bit", master_weights=True)
        twin.load_state_dict(state_dict)
        assert state_bits(twin) == state_bits(optimizer)


def test_a_view_outlives_its_optimizer() -> None:
    optimizer = AdamW(parameters(), variant="paged_8bit")
    train(optimizer, 2)
    before = state_bits(optimizer)
    state_dict = optimizer.state_dict()
    del optimizer
    for other in [AdamW(parameters(), variant="8bit") for _ in range(3)]:
        train(other, 1)  # to use freed memory anew
    assert [
        dict(zip(e, bits([t.reshape(-1) for t in e.values()]), strict=True))
        for e in state_dict["state"].values()
    ] == before


def test_the_form_of_a_native_state_dict() -> None:
    optimizer = AdamW(parameters(), variant="8bit")
    before = optimizer.state_dict()
    assert list(before) == ["state", "param_groups", "adamw_triton_version"]
    assert (before["state"], before["adamw_triton_version"]) == ({}, 1)
    train(optimizer, 1)
    state_dict = optimizer.state_dict()
    assert set(state_dict["state"][0]) == release_0.KEYS_8BIT
    assert set(state_dict["state"][2]) == release_0.KEYS_32BIT
    assert "adamw_triton_version" not in optimizer.state_dict(state_format="portable")


def test_unknown_state_format() -> None:
    with pytest.raises(
        ValueError, match=r"Invalid state_format: 'torch'; it must be one of 'native', 'portable'"
    ):
        AdamW(parameters()).state_dict(state_format="torch")


def test_hooks_of_the_user_see_the_final_form() -> None:
    optimizer = AdamW(parameters(), variant="8bit")
    train(optimizer, 1)
    seen: list[set[str]] = []
    optimizer.register_state_dict_post_hook(lambda _, state_dict: seen.append(set(state_dict["state"][0])))
    optimizer.state_dict(state_format="portable")
    optimizer.state_dict()
    assert seen == [release_0.KEYS_32BIT, release_0.KEYS_8BIT]


@pytest.mark.parametrize("variant", VARIANTS)
def test_map_location_and_dtype_of_the_reader_do_not_matter(variant: str, tmp_path: Path) -> None:
    """ "meta" stands for a device that is not the parameters'."""
    params = parameters(dtype=torch.bfloat16)
    optimizer = AdamW(params, variant=variant)
    train(optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    for options in ({"map_location": "cpu"}, {"map_location": {"cpu": "cpu"}}, {"mmap": True}):
        loaded = torch.load(tmp_path / "state.pt", weights_only=True, **options)
        twin = AdamW([Parameter(p.detach().clone()) for p in params], variant=variant)
        twin.load_state_dict(loaded)
        assert state_bits(twin) == state_bits(optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_map_location_with_a_gpu(variant: str, place: str, tmp_path: Path) -> None:
    params = [Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = AdamW(params, variant=variant)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    file = 8 << 10  # names, groups and the archive itself
    assert (tmp_path / "state.pt").stat().st_size <= state_bytes(optimizer) + file
    twin = AdamW([Parameter(p.detach().clone()) for p in params], variant=variant)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, map_location=place))
    assert state_bits(twin) == state_bits(optimizer)


# --- Memory while saving ----------------------------------------------------------------------------------

MIB = int(os.environ.get("ADAMW_TRITON_SAVED_MIB", "64"))
"""Of state; ``ADAMW_TRITON_SAVED_MIB=1024 pytest tests/checkpoint/test_saving.py -k peak`` for 1 GiB."""

MEASURE = """
import sys, torch
from adamw_triton import AdamW

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) << 10

variant, mib, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
numel = (mib << 20) // (8 if "32bit" in variant else 2) // 4
params = [torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16)) for _ in range(4)]
for param in params:
    param.grad = torch.ones_like(param)
optimizer = AdamW(params, variant=variant)
optimizer.step()
state = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values())
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
torch.save(optimizer.state_dict(), file)
print(state, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("variant", ["paged_32bit", "paged_8bit"])
def test_peak_memory_while_saving_paged_state(variant: str, tmp_path: Path) -> None:
    """Under 1.1 times the state in all: what saving adds is under a tenth."""
    state, added = map(int, printed(MEASURE, variant, MIB, tmp_path / "state.pt").split())
    print(f"{variant}: {state >> 20} MiB of state, saving adds {added / 2**20:.1f} MiB")
    assert state >= MIB << 20
    assert added < 0.1 * state
    assert (tmp_path / "state.pt").stat().st_size < 1.01 * state
