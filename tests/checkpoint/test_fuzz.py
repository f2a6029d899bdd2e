"""Damaged state_dicts and files: refused by name with nothing changed, or loaded right.

``ADAMW_TRITON_FUZZ=n`` tries n of each; a failure prints its seed.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.checkpoint import files
from adamw_triton.checkpoint.conversion import FORMS
from adamw_triton.cli import main
from adamw_triton_kernels import codes
from tests.checkpoint import damage, release_0
from tests.checkpoint.sources import HYPER, trained
from tests.optimizer.problems import bits, parameters, set_grads, train

DICTS = int(os.environ.get("ADAMW_TRITON_FUZZ", "320"))
FILES = int(os.environ.get("ADAMW_TRITON_FUZZ", "200"))
AT_ONCE = 40
"""Examples of one test: a failure costs the others of its test."""

SOURCES = (
    "ours 32bit",
    "ours 8bit",
    "ours 8bit, blocks of 256",
    "ours paged_8bit",
    "torch AdamW",
    "torch Adam",
)
THEIRS = ("bitsandbytes 8-bit", "bitsandbytes 32-bit", "torchao 8-bit")
VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit", "auto")
NAMES = r"parameter |param_groups|optimizer's groups|adamw_triton_version|optimizer's state_dict|the state"
SHAPES = ((70, 70), (64, 128), (5000,), (3,), (1,))


@functools.cache
def source(name: str) -> bytes:
    file = io.BytesIO()
    torch.save(trained(name, steps=2)[1].state_dict(), file)
    return file.getvalue()


def a_source(rng: random.Random) -> Any:
    name = rng.choice(SOURCES if rng.random() < 0.7 else THEIRS)
    try:
        content = source(name)
    except pytest.skip.Exception:  # not installed here
        content = source("ours 8bit")
    return torch.load(io.BytesIO(content), weights_only=False)


def snapshot(optimizer: AdamW) -> Any:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [
        {key: (id(value), bits([value.reshape(-1)])) for key, value in optimizer.state[p].items()}
        for p in params
        if p in optimizer.state
    ]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return id(optimizer.state), bits(params), entries, groups, id(optimizer.plan), optimizer.memory()


@pytest.mark.parametrize("first", range(0, DICTS, AT_ONCE))
def test_damaged_state_dicts(first: int) -> None:
    for seed in range(first, min(first + AT_ONCE, DICTS)):
        print(f"seed {seed}", end=" ")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse and nested tensors are said to be new
            check_state_dict(seed)


def refusal_of(optimizer: AdamW, state_dict: Any) -> str | None:
    try:
        optimizer.load_state_dict(state_dict)
    except ValueError as error:
        return str(error)
    return None


def check_state_dict(seed: int) -> None:
    rng = random.Random(seed)
    optimizer = AdamW(parameters(SHAPES), **HYPER, variant=rng.choice(VARIANTS))
    if rng.random() < 0.8:
        train(optimizer, 1)
    twin = copy.deepcopy(optimizer)
    state_dict = a_source(rng)
    print(damage.damage(state_dict, rng))
    expected = read_otherwise(state_dict)
    before = snapshot(optimizer)
    refusal = refusal_of(optimizer, state_dict)
    if refusal is not None:
        assert re.search(NAMES, refusal), refusal
        assert snapshot(optimizer) == before
        assert bits(train(optimizer, 1, first=2)) == bits(train(twin, 1, first=2))
        return
    params = optimizer.param_groups[0]["params"]
    set_grads(params, 5)
    if expected is not None:
        check_loaded(optimizer, expected)
    optimizer.step()
    assert all(param.isfinite().all() for param in params)


Expected = dict[int, tuple[float, Tensor, Tensor, int]]


def read_otherwise(state_dict: Any) -> Expected | None:
    """Step, m, v, and how many scales of ours there are, of each parameter, by formulas that are not the
    loader's. None if that cannot be read so: then it has to be refused, or is not compared."""
    found: Expected = {}
    try:
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for position, key in enumerate(keys):
            entry = state_dict["state"].get(key)
            if entry and (read := _read(entry)) is not None:
                found[position] = read
    except Exception:
        return None
    return found


def _read(entry: dict[str, Any]) -> tuple[float, Tensor, Tensor, int] | None:
    if "step" not in entry:
        return None
    entry = {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}
    step = float(entry["step"])
    if "exp_avg_codes" in entry:
        plain = {key: value.detach() for key, value in entry.items() if isinstance(value, Tensor)}
        return step, *release_0.decode(plain), entry["exp_avg_scales"].numel()
    if "absmax1" in entry:
        tables = [(entry[f"state{i}"], entry[f"absmax{i}"], entry[f"qmap{i}"]) for i in (1, 2)]
    elif hasattr(entry.get("exp_avg"), "codes"):
        tables = [(e.codes, e.scale, e.qmap) for e in (entry["exp_avg"], entry["exp_avg_sq"])]
    else:
        names = ("state1", "state2") if "state1" in entry else ("exp_avg", "exp_avg_sq")
        m, v = (entry[name].detach().resolve_neg().float() for name in names)
        return step, m, v, 0
    m, v = (
        table[codes.reshape(-1).long()]
        * scales.repeat_interleave(math.ceil(codes.numel() / scales.numel() / 16) * 16)[: codes.numel()]
        for codes, scales, table in tables
    )
    return step, m.view(tables[0][0].shape), v.view(tables[0][0].shape), 0


def check_loaded(optimizer: AdamW, expected: Expected) -> None:
    """After it is placed, and before it is stepped."""
    optimizer.offload()  # of "auto", what was loaded is placed now
    portable = optimizer.state_dict(state_format="portable")["state"]
    native = optimizer.state_dict()["state"]
    for position, (step, m, v, scales) in expected.items():
        if position not in native or "exp_avg" not in portable[position]:
            continue
        there = portable[position]
        assert there["step"] == torch.tensor(step)  # in fp32
        codes = native[position].get("exp_avg_scales")
        if codes is None or codes.numel() == scales:
            torch.testing.assert_close(there["exp_avg"], m, rtol=1e-5, atol=1e-37)
            torch.testing.assert_close(there["exp_avg_sq"], v, rtol=1e-5, atol=1e-37)
        else:  # an ulp beside us a code may be another
            moments = encoded(m, v, native[position], optimizer.param_groups[0]["betas"])
            for key, wanted in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                assert (there[key] - wanted).double().norm() <= 0.02 * wanted.double().norm()


def encoded(
    m: Tensor, v: Tensor, like: dict[str, Tensor], betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Once in our codes, v raised to what the betas allow."""
    b1, b2 = betas
    bound = (1 - b1) / ((1 - b2) * (1 - b1**2 / b2)) ** 0.5
    into = {key: torch.zeros_like(like[key]).reshape(-1) for key in release_0.KEYS_8BIT - {"step"}}
    v = torch.maximum(v, (m / bound) ** 2)
    codes.encode_8bit(m.reshape(-1), v.reshape(-1).clamp(max=codes.LARGEST_ROOT**2), into, 128)
    m_there, v_there = codes.decode_8bit(into, 128)
    return m_there.view(m.shape), v_there.view(v.shape)


# --- Files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("whole")
    optimizer = AdamW(parameters(((70, 70), (3,))), variant="8bit")
    train(optimizer, 1)
    torch.save(optimizer.state_dict(), folder / "zip.pt")
    torch.save(optimizer.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    files.save(optimizer.state_dict(), folder / "flat.safetensors")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("first", range(0, FILES, AT_ONCE))
def test_damaged_files(
    first: int, whole: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in range(first, min(first + AT_ONCE, FILES)):
        rng = random.Random(seed)
        good, how = rng.choice(whole), rng.choice(damage.BYTES)
        source = tmp_path / good.name
        source.write_bytes(good.read_bytes())
        how(source, rng)
        target = tmp_path / rng.choice(("out.pt", "out.safetensors"))
        target.write_text("old")
        before = sorted(os.listdir(tmp_path))
        capfd.readouterr()
        what = f"seed {seed}: {how.__name__} of {good.name}"
        try:
            code = main(["convert", str(source), str(target), "--force", "--to", rng.choice(list(FORMS))])
        except BaseException as error:
            raise AssertionError(what) from error
        said = capfd.readouterr().err
        assert sorted(os.listdir(tmp_path)) == before, what
        if code:
            assert code == 2, what
            assert [line for line in said.splitlines() if line.startswith("adamw-triton convert: ")], what
            assert "Traceback" not in said, what
            assert target.read_text() == "old", what
        else:
            optimizer = AdamW([Parameter(p) for p in parameters(((70, 70), (3,)))], variant="8bit")
            refusal = refusal_of(optimizer, files.load(target))  # another number of parameters
            assert refusal is None or re.search(NAMES, refusal), what
        source.unlink()
        target.unlink()
