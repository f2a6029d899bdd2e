"""Files that release 0 wrote load from now on, and release 0's reader reads what is written today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.state.formats import Blockwise8
from tests.checkpoint import release_0
from tests.checkpoint.data import make
from tests.optimizer.problems import bits, parameters, train

DATA = Path(make.__file__).parent


def frozen(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(DATA / f"version_1_{name}.pt", weights_only=True)
    return loaded


def flat(state: dict[Any, dict[str, Any]]) -> list[bytes]:
    return [b for entry in state.values() for b in bits([entry[key].reshape(-1) for key in sorted(entry)])]


@pytest.mark.parametrize("name", make.OPTIONS)
def test_files_of_version_1_load(name: str) -> None:
    file = frozen(name)
    optimizer = make.optimizer(name, params := [Parameter(value) for value in file["params"]])
    optimizer.param_groups[0]["lr"] = 5.0
    optimizer.load_state_dict(file["optimizer"])
    assert flat(dict(optimizer.state)) == flat(file["optimizer"]["state"])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]
    train(optimizer, 2, first=4)
    for param, later in zip(params, file["two_steps_later"], strict=True):
        # Processors differ in the last bit of fp32, which may round to the next bf16.
        torch.testing.assert_close(param.detach(), later, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["8bit", "8bit_256"])
def test_files_of_version_1_are_read_by_other_variants(name: str) -> None:
    file = frozen(name)
    groups = [{"params": [Parameter(value)]} for value in file["params"]]
    optimizer = AdamW(groups, variant="paged_32bit")
    optimizer.load_state_dict(file["optimizer"])
    now, then = release_0.read(optimizer.state_dict()), release_0.read(file["optimizer"])
    for (step, *moments), (old_step, *old_moments) in zip(now, then, strict=True):
        assert step == old_step == 3
        for moment, old in zip(moments, old_moments, strict=True):
            torch.testing.assert_close(moment, old, rtol=1e-6, atol=0)


@pytest.mark.parametrize("state_format", ["native", "portable"])
@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_32bit", "paged_8bit"])
def test_release_0_reads_what_is_written_today(variant: str, state_format: str, tmp_path: Path) -> None:
    optimizer = AdamW(parameters(), variant=variant)
    train(optimizer, 3)
    torch.save(optimizer.state_dict(state_format=state_format), tmp_path / "state.pt")
    state_dict = torch.load(tmp_path / "state.pt", weights_only=True)
    for (step, m, v), now in zip(release_0.read(state_dict), optimizer.state.values(), strict=True):
        assert step == 3
        expected = _decoded(now)
        torch.testing.assert_close(m, expected["exp_avg"], rtol=1e-6, atol=0)
        torch.testing.assert_close(v, expected["exp_avg_sq"], rtol=1e-6, atol=0)


def _decoded(entry: dict[str, Any]) -> dict[str, Tensor]:
    if "exp_avg" in entry:
        return {key: entry[key] for key in ("exp_avg", "exp_avg_sq")}
    shape = entry["exp_avg_codes"].shape
    views = {key: value.reshape(-1) for key, value in entry.items() if key != "step"}
    return {key: moment.view(shape) for key, moment in Blockwise8().decode(views).items()}
