"""Any AdamW's state in, ours out to torch's: the moments that arrive are those that left."""

from __future__ import annotations

import copy
import io
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.checkpoint.arrivals import LARGEST_V, raised
from tests.checkpoint import release_0
from tests.checkpoint.sources import HYPER, SOURCES, bitsandbytes, meaning, ours, trained
from tests.optimizer.problems import DTYPES, bits, parameters, set_grads, state_bits, train

TARGETS = {
    "32bit": ours("32bit"),
    "8bit": ours("8bit"),
    "8bit, blocks of 256": ours("8bit", 256),
    "paged_32bit": ours("paged_32bit"),
    "paged_8bit": ours("paged_8bit"),
}
EXACT = {("ours 8bit", "8bit"), ("ours 8bit", "paged_8bit"), ("ours paged_8bit", "8bit")} | {
    ("ours paged_8bit", "paged_8bit"),
    ("ours 8bit, blocks of 256", "8bit, blocks of 256"),
}
"""Pairs with the same codes: (from, to)."""


def saved(state_dict: dict[str, Any], weights_only: bool = True) -> dict[str, Any]:
    """After a trip through a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=weights_only)
    return loaded


def copies(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def next_update(params: list[Parameter], optimizer: torch.optim.Optimizer, step: int) -> list[Tensor]:
    before = [p.detach().clone() for p in params]
    return [a - b for a, b in zip(train(optimizer, 1, first=step), before, strict=True)]


def exact_update(params: list[Parameter], source: torch.optim.Optimizer, step: int) -> list[Tensor]:
    """By torch's AdamW in double, from the meaning of the source's state."""
    twins = [Parameter(p.detach().double()) for p in params]
    moments = meaning(source)
    reference = torch.optim.AdamW(twins, **{**HYPER, "weight_decay": source.param_groups[0]["weight_decay"]})
    for twin, (m, v) in zip(twins, moments, strict=True):
        reference.state[twin] = {
            "step": torch.tensor(step - 1.0),
            "exp_avg": m.double(),
            "exp_avg_sq": v.double(),
        }
    set_grads(params, step)
    for twin, param in zip(twins, params, strict=True):
        assert param.grad is not None
        twin.grad = param.grad.double()
    before = [t.detach().clone() for t in twins]
    reference.step()
    return [(a - b).detach() for a, b in zip(twins, before, strict=True)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_pair(source: str, target: str) -> None:
    params, optimizer = trained(source)
    expected = meaning(optimizer)
    twins = copies(params)
    loaded = TARGETS[target](twins)
    loaded.param_groups[0].update(lr=7.0, betas=(0.1, 0.1), eps=1.0)
    loaded.load_state_dict(saved(optimizer.state_dict()))
    group = loaded.param_groups[0]
    assert group["lr"] == pytest.approx(HYPER["lr"], rel=1e-7)  # torchao keeps it in fp32
    assert (group["betas"], group["eps"]) == (HYPER["betas"], HYPER["eps"])
    assert all(float(entry["step"]) == 20 for entry in loaded.state.values())
    coarse = "8bit" in target and (source, target) not in EXACT
    if (source, target) in EXACT:
        assert state_bits(loaded) == state_bits(optimizer)
    for twin, (m, v) in zip(twins, expected, strict=True):
        entry = loaded.state[twin]
        if "exp_avg" in entry:  # 32-bit: what the source's own decoder gives; our codes are decoded in double
            # here, and in fp32 there
            rtol = 1e-6 if source.startswith("ours") else 0
            torch.testing.assert_close(entry["exp_avg"], m, rtol=rtol, atol=0)
            torch.testing.assert_close(entry["exp_avg_sq"], v, rtol=rtol, atol=0)
    wanted = exact_update(params, optimizer, 21)
    for update, exact in zip(next_update(twins, loaded, 21), wanted, strict=True):
        if coarse and exact.numel() >= 4096:
            assert (update - exact).norm() <= 0.03 * exact.norm()
        else:  # fp32's rounding of the parameter, which is near 1, and of the update
            torch.testing.assert_close(update.double(), exact, rtol=1e-4, atol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", [name for name in SOURCES if name.startswith(("ours", "torch "))])
def test_portable_state_goes_on_in_torch(source: str, dtype: torch.dtype) -> None:
    params, optimizer = trained(source, dtype=dtype)
    if isinstance(optimizer, AdamW):
        state_dict = optimizer.state_dict(state_format="portable")
        for entry, (m, v) in zip(state_dict["state"].values(), meaning(optimizer), strict=True):
            assert list(entry) == ["step", "exp_avg", "exp_avg_sq"]
            torch.testing.assert_close(entry["exp_avg"], m, rtol=1e-6, atol=0)
            torch.testing.assert_close(entry["exp_avg_sq"], v, rtol=1e-6, atol=0)
    else:
        middle = AdamW(copies(params), variant="paged_32bit")
        middle.load_state_dict(optimizer.state_dict())
        state_dict = middle.state_dict(state_format="portable")
    twins = copies(params)
    torchs = torch.optim.AdamW(twins)
    torchs.load_state_dict(saved(state_dict))
    for twin, entry in zip(twins, state_dict["state"].values(), strict=True):  # torch's loader casts
        assert bits([torchs.state[twin]["exp_avg_sq"]]) == bits([entry["exp_avg_sq"].to(dtype)])
    if not isinstance(optimizer, AdamW):
        assert state_bits(torchs) == state_bits(optimizer)
    if dtype is torch.float32:
        updates = next_update(twins, torchs, 21)
        for update, exact in zip(updates, exact_update(params, optimizer, 21), strict=True):
            torch.testing.assert_close(update.double(), exact, rtol=1e-4, atol=5e-7)


def test_portable_state_comes_back() -> None:
    params, optimizer = trained("ours 32bit")
    back = AdamW(copies(params), variant="paged_32bit")
    back.load_state_dict(saved(optimizer.state_dict(state_format="portable")))  # type: ignore[call-arg]
    assert state_bits(back) == state_bits(optimizer)


def test_100_steps_of_bitsandbytes_and_100_of_ours() -> None:
    """The update after loading is that of its state decoded in fp32, and so are the next 99."""
    params, optimizer = trained("bitsandbytes 8-bit", steps=100)
    expected = meaning(optimizer)
    ours32 = AdamW(twins := copies(params), variant="32bit")
    ours32.load_state_dict(saved(optimizer.state_dict()))
    torchs = torch.optim.AdamW(theirs := copies(params), **HYPER)
    for p, (m, v) in zip(theirs, expected, strict=True):
        torchs.state[p] = {"step": torch.tensor(100.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    first = exact_update(params, optimizer, 101)
    for step in range(101, 201):
        updates = next_update(twins, ours32, step)
        for update, exact in zip(updates, next_update(theirs, torchs, step), strict=True):
            assert (update - exact).abs().max() <= 1e-6
        if step == 101:
            for update, exact in zip(updates, first, strict=True):
                assert (update - exact).abs().max() <= 1e-6
    assert torch.stack([(a - b).abs().max() for a, b in zip(twins, theirs, strict=True)]).max() <= 1e-5


@pytest.mark.parametrize("wrapped", [True, False], ids=["as of 0.50", "flat, as before"])
def test_blocks_of_2048(wrapped: bool) -> None:
    """As bitsandbytes before 0.45 saved them, made with its own functions."""
    functional = pytest.importorskip("bitsandbytes.functional")
    (param,) = parameters(((70, 70),))
    m, v = torch.randn(70, 70) * 1e-3, torch.rand(70, 70) ** 4 * 1e-6
    state: dict[str, Any] = {}
    for number, moment in ((1, m), (2, v)):
        table = functional.create_dynamic_map(signed=number == 1)
        codes, quantized = functional.quantize_blockwise(moment, code=table, blocksize=2048)
        assert quantized.absmax.shape == (3,)
        state |= {f"state{number}": codes, f"absmax{number}": quantized.absmax, f"qmap{number}": table}
        moment.copy_(functional.dequantize_blockwise(codes, quantized, blocksize=2048))
    entry = {"step": 5, "__bnb_optimizer_quant_state__": state} if wrapped else {"step": 5, **state}
    group = {**HYPER, "alpha": 0.0, "t_alpha": None, "t_beta3": None, "params": [0]}
    optimizer = AdamW([param], variant="32bit")
    optimizer.load_state_dict(saved({"state": {0: entry}, "param_groups": [group]}))
    assert float(optimizer.state[param]["step"]) == 5
    assert bits([optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]]) == bits([m, v])


def test_channels_last_state_of_bitsandbytes_is_refused() -> None:
    (param,) = parameters(((8, 16, 8, 8),))
    param.data = param.data.to(memory_format=torch.channels_last)
    optimizer = bitsandbytes("AdamW8bit")([param])
    train(optimizer, 1)
    with pytest.raises(ValueError, match="codes of bitsandbytes 8-bit must be contiguous"):
        AdamW([Parameter(param.detach().clone())]).load_state_dict(optimizer.state_dict())


READ_TORCHAO = """
import sys
from pathlib import Path
import torch
from adamw_triton import AdamW
from adamw_triton.checkpoint import files
state_dict = files.load(Path(sys.argv[1]))
optimizer = AdamW([torch.nn.Parameter(torch.zeros(shape)) for shape in {shapes}], variant="32bit")
optimizer.load_state_dict(state_dict)
assert "torchao" not in sys.modules
torch.save(optimizer.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_torchao_is_read_without_torchao(tmp_path: Path) -> None:
    params, optimizer = trained("torchao 8-bit")
    torch.save(optimizer.state_dict(), tmp_path / "in.pt")
    code = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n" + READ_TORCHAO.format(
        shapes=[tuple(p.shape) for p in params]
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "in.pt", tmp_path / "out.pt"], check=True)
    read = release_0.read(torch.load(tmp_path / "out.pt", weights_only=True))
    for (step, m, v), (expected_m, expected_v) in zip(read, meaning(optimizer), strict=True):
        assert step == 20
        assert bits([m, v]) == bits([expected_m, expected_v])


BETAS = [
    (0.9, 0.999),
    (0.0, 0.99),
    (0.5, 0.5),
    (0.95, 0.9),
    (0.9, 0.81),
    (0.0, 0.0),
    (0.99, 0.999),
    (0.9, 0.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["8bit", "paged_8bit"])
def test_moments_that_half_precision_has_rounded(
    variant: str, dtype: torch.dtype, betas: tuple[float, float]
) -> None:
    """A v that was rounded to nothing beside its m takes no neighbour's m: each moment arrives, as far as the
    betas bound one by the other."""
    generator = torch.Generator().manual_seed(0)
    grad = (torch.rand(64, 128, generator=generator) * 0.02).to(dtype)
    theirs = torch.optim.AdamW(
        [param := torch.zeros(64, 128, dtype=dtype, requires_grad=True)], eps=1e-4, betas=betas
    )
    for _ in range(3):
        param.grad = grad
        theirs.step()
    if dtype is torch.float16 and betas[1] > 0.99:
        assert bool((theirs.state[param]["exp_avg_sq"] == 0).any())
    ours = AdamW([param.detach().clone().requires_grad_()], variant=variant)
    ours.load_state_dict(theirs.state_dict())
    loaded = ours.state_dict(state_format="portable")["state"][0]
    for key in ("exp_avg", "exp_avg_sq"):
        there, here = theirs.state[param][key].float().flatten(), loaded[key].flatten()
        if betas[0] ** 2 < betas[1] or betas == (0.0, 0.0):
            assert torch.cosine_similarity(there, here, dim=0) > 0.99, key


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.26), (0.0, 0.9), (0.8, 0.7)], ids=str)
def test_the_bound_is_kept_by_every_adamw(betas: tuple[float, float]) -> None:
    """So nothing of a state in fp32 is changed by it, and it is no larger than it has to be."""
    b1, b2 = betas
    bound = (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))
    m = v = torch.zeros((), dtype=torch.float64)
    for step in range(400):  # the gradients of equality
        grad = torch.tensor((b2 / b1 if b1 else 1e3) ** (step - 399), dtype=torch.float64)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
    assert 0.999 * bound <= float(m / v.sqrt()) <= bound * (1 + 1e-9)
    moments = {"exp_avg": m.float() * 0.999, "exp_avg_sq": v.float()}
    assert torch.equal(raised(moments, betas, lost=LARGEST_V)["exp_avg_sq"], moments["exp_avg_sq"])
    beyond = {"exp_avg": m.float() * 1.1, "exp_avg_sq": v.float()}  # of other betas, in fp32
    assert torch.equal(raised(beyond, betas, lost=0.0)["exp_avg_sq"], beyond["exp_avg_sq"])
    moments = {"exp_avg": torch.tensor([1e-3, 1e30]), "exp_avg_sq": torch.zeros(2)}
    lost = raised(moments, betas, lost=0.0)["exp_avg_sq"]
    assert float(lost[0]) == pytest.approx((1e-3 / bound) ** 2, rel=1e-6)
    assert lost.isfinite().all()


def test_into_32_bits_half_precision_goes_as_it_is() -> None:
    """As into torch's: with its eps, which comes along, the updates are torch's."""
    theirs = torch.optim.AdamW(
        [param := torch.zeros(64, 128, dtype=torch.float16, requires_grad=True)], eps=1e-4
    )
    param.grad = torch.full_like(param, 1e-3)
    theirs.step()
    ours = AdamW([param.detach().clone().requires_grad_()], variant="32bit")
    ours.load_state_dict(theirs.state_dict())
    for key, value in theirs.state[param].items():
        assert torch.equal(next(iter(ours.state.values()))[key], value.float())


def test_channels_last_parameters_change_their_layout() -> None:
    """8-bit blocks count in memory order: the state keeps the one that it was saved in, and its bits."""
    values = torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    strided = Parameter(values.clone().to(memory_format=torch.channels_last))
    optimizer = AdamW([strided], variant="8bit")
    train(optimizer, 5)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        twin = Parameter(strided.detach().clone(memory_format=memory_format))
        loaded = AdamW([twin], variant="8bit")
        loaded.load_state_dict(saved(optimizer.state_dict()))
        assert state_bits(loaded) == state_bits(optimizer)
        assert bits(train(copy.deepcopy(loaded), 2, first=6)) == bits(
            train(copy.deepcopy(optimizer), 2, first=6)
        )


def test_adams_coupled_weight_decay_is_told(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters(((3,),))
    adam = torch.optim.Adam(params, weight_decay=0.1)
    train(adam, 1)
    with caplog.at_level(logging.WARNING, "adamw_triton"):
        AdamW(copies(params)).load_state_dict(adam.state_dict())
    assert "weight_decay=0.1 added to the gradient" in caplog.text


def test_amsgrad_survives() -> None:
    params = parameters()
    torchs = torch.optim.AdamW(params, amsgrad=True)
    train(torchs, 5)
    loaded = AdamW(copies(params), variant="paged_32bit")
    loaded.load_state_dict(saved(torchs.state_dict()))
    for a, b in zip(loaded.state.values(), torchs.state.values(), strict=True):
        assert bits([a["max_exp_avg_sq"]]) == bits([b["max_exp_avg_sq"]])
    back = torch.optim.AdamW(copies(params))
    back.load_state_dict(loaded.state_dict(state_format="portable"))
    assert back.param_groups[0]["amsgrad"]
    assert "max_exp_avg_sq" in back.state_dict()["state"][0]


def test_complex_parameters_survive() -> None:
    values = torch.randn(60, 50, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    param = Parameter(values)
    optimizer = AdamW([param], variant="8bit")
    for step in range(3):
        param.grad = torch.randn(60, 50, dtype=torch.complex64, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    portable = optimizer.state_dict(state_format="portable")
    m, _ = release_0.decode(optimizer.state[param])
    torch.testing.assert_close(portable["state"][0]["exp_avg"], torch.view_as_complex(m), rtol=1e-6, atol=0)
    torchs = torch.optim.AdamW([twin := Parameter(values.clone())])
    torchs.load_state_dict(saved(portable))
    assert torchs.state[twin]["exp_avg_sq"].dtype is torch.complex64
    back = AdamW([Parameter(values.clone())], variant="32bit")
    back.load_state_dict(torchs.state_dict())
