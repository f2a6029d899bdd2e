"""Exact weights out as fp32 and in again: one by one, as a model's state_dict, before the first step too."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamw_triton import AdamW
from adamw_triton.places import placing
from tests.checkpoint import sources
from tests.optimizer.problems import bits, saved, state_bits, train

VARIANTS = ("auto", "32bit", "8bit", "paged_32bit", "paged_8bit")
HALVES = (torch.bfloat16, torch.float16)
CASES = [(variant, dtype) for variant in VARIANTS for dtype in HALVES]


class Tied(nn.Module):
    """A head that is its embedding; norms, buffers, and a layer that nobody trains."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(100, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.frozen = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)
        self.norm.to(torch.float32)
        self.frozen.requires_grad_(False)


def optimizer_of(model: nn.Module, variant: str = "32bit", **changes: Any) -> AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": 1e-3, "variant": variant, "master_weights": True}
    return AdamW(trained, **{**settings, **changes})


def model_bits(model: nn.Module) -> dict[str, bytes]:
    return dict(zip(model.state_dict(), bits(list(model.state_dict().values())), strict=True))


def train_alike(theirs: AdamW, ours: AdamW, steps: int) -> None:
    """fp32 parameters on the gradients that the others of 16 bits had."""

    def rounded(step: int) -> None:
        pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
        for param, twin in pairs:
            twin.grad = twin.grad.to(param.dtype).to(twin.dtype)

    train(theirs, steps, before=rounded)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name].to(a[name].dtype)), name


# --- Out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_masters_are_the_weights_of_the_run_in_fp32(variant: str, dtype: torch.dtype) -> None:
    model = Tied(dtype)
    optimizer = optimizer_of(model, variant, lr=1e-5)
    train(optimizer, 5)
    twin = Tied(dtype).float()
    theirs = optimizer_of(twin, "8bit" if "8bit" in variant else "32bit", lr=1e-5)
    train_alike(theirs, optimizer, 5)
    masters = optimizer.master_state_dict(model)
    for name, param in twin.named_parameters():
        assert torch.equal(masters[name].float(), param), name
    for name, param in model.named_parameters():
        assert masters[name].dtype is (torch.float32 if param.requires_grad else dtype)
        if param.requires_grad:
            alone = optimizer.master_weight(param)
            assert torch.equal(alone, masters[name])
            assert (alone.dtype, alone.shape, alone.device) == (torch.float32, param.shape, param.device)
            assert torch.equal(alone.to(dtype) if param.dtype is dtype else alone, param.detach())


def test_the_state_dict_is_the_models_but_for_its_exact_weights() -> None:
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model)
    train(optimizer, 2)
    found = optimizer.master_state_dict(model)
    plain = model.state_dict()
    assert list(found) == list(plain)
    assert found["embedding.weight"] is found["head.weight"]
    assert found["hidden.weight"].dtype is torch.float32
    for name in ("frozen.weight", "norm.running_mean", "norm.weight", "norm.num_batches_tracked"):
        assert found[name].dtype is plain[name].dtype
        assert torch.equal(found[name], plain[name])
    assert not any(value.requires_grad for value in found.values())
    assert all(value.device.type == "cpu" for value in found.values())
    assert found._metadata == plain._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes_are_the_same_before_the_first_step_and_without_gradients(variant: str) -> None:
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model, variant)
    before = optimizer.master_state_dict(model)
    assert not optimizer.state
    model.hidden.bias.grad = torch.ones(64, dtype=torch.bfloat16)
    optimizer.step()
    after = optimizer.master_state_dict(model)
    for name, value in model.named_parameters():
        wanted = torch.float32 if value.requires_grad else torch.bfloat16
        assert before[name].dtype is after[name].dtype is wanted
        assert torch.equal(before[name], after[name]) == (name != "hidden.bias")


def test_a_master_is_a_new_tensor_also_where_nothing_is_kept() -> None:
    for dtype in (*HALVES, torch.float32, torch.complex64):
        param = nn.Parameter(torch.randn(3, 5, dtype=torch.complex64 if dtype.is_complex else None).to(dtype))
        optimizer = AdamW([param], variant="32bit", master_weights=True)
        for _ in range(2):
            master = optimizer.master_weight(param)
            assert torch.equal(master, param.detach().to(master.dtype))
            assert master.data_ptr() != param.data_ptr()
            assert not master.requires_grad
            param.grad = torch.ones_like(param)
            before = param.detach().clone()
            master.zero_()
            assert torch.equal(param, before)


def test_a_weight_that_somebody_else_wrote_is_its_own_master() -> None:
    for dtype in HALVES:
        model = Tied(dtype)
        optimizer = optimizer_of(model)
        train(optimizer, 2)
        weight = model.hidden.weight
        with torch.no_grad():
            weight.copy_(torch.randn_like(weight))
        assert torch.equal(optimizer.master_weight(weight), weight.float())
        assert torch.equal(optimizer.master_state_dict(model)["hidden.weight"], weight.float())
        assert not torch.equal(optimizer.master_weight(model.head.weight), model.head.weight.float())


@pytest.mark.parametrize("through", ["state_dict", "portable", "pickle", "other format"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_somebody_else_wrote_is_saved_without_an_old_half(variant: str, through: str) -> None:
    """An average of weights is swapped in, say, and then all is saved without another step."""
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model, variant)
    train(optimizer, 2)
    with torch.no_grad():
        model.hidden.weight.copy_(torch.randn(64, 64))
    head = optimizer.master_weight(model.head.weight)
    if through == "pickle":
        model, optimizer = copy.deepcopy((model, optimizer))
    elif through == "other format":
        optimizer.param_groups[0]["state_bits"] = 32 if "8bit" in variant else 8
        optimizer.offload()  # settles it
    else:
        state = optimizer.state_dict(state_format="portable" if through == "portable" else None)
        optimizer = optimizer_of(model, variant)
        optimizer.load_state_dict(state)
    assert torch.equal(optimizer.master_weight(model.hidden.weight), model.hidden.weight.float())
    assert torch.equal(optimizer.master_weight(model.head.weight), head)


def test_other_memory_orders() -> None:
    weight = nn.Parameter(torch.randn(8, 16, 3, 3).to(torch.bfloat16, memory_format=torch.channels_last))
    turned = nn.Parameter(torch.randn(70, 80, dtype=torch.bfloat16).t())
    twins = [nn.Parameter(p.detach().float()) for p in (weight, turned)]
    for variant in ("32bit", "8bit", "paged_8bit"):
        optimizer = AdamW([weight, turned], lr=1e-5, variant=variant, master_weights=True)
        theirs = AdamW(twins, lr=1e-5, variant=variant.removeprefix("paged_"))
        with torch.no_grad():
            for param, twin in zip((weight, turned), twins, strict=True):
                twin.copy_(param)
        train(optimizer, 3)
        train_alike(theirs, optimizer, 3)
        for param, twin in zip((weight, turned), twins, strict=True):
            assert torch.equal(optimizer.master_weight(param), twin)


def test_what_is_not_the_optimizers() -> None:
    model, other = Tied(torch.bfloat16), Tied(torch.bfloat16)
    optimizer = optimizer_of(model)
    with pytest.raises(
        ValueError, match=r"a Parameter of shape \(64, 64\) is no parameter of this optimizer"
    ):
        optimizer.master_weight(other.hidden.weight)
    for call in (optimizer.master_state_dict, lambda m: optimizer.load_master_state_dict(m, m.state_dict())):
        with pytest.raises(ValueError, match="the Tied has no parameter of this optimizer"):
            call(other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_while_state_is_offloaded_or_moved_by_others(variant: str) -> None:
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model, variant)
    train(optimizer, 2)
    there = optimizer.master_state_dict(model)
    optimizer.offload()
    equal(optimizer.master_state_dict(model), there)
    for entry in optimizer.state.values():
        entry.update({key: value.clone() for key, value in entry.items()})
    equal(optimizer.master_state_dict(model), there)
    again = AdamW(optimizer.param_groups[0]["params"], variant=variant, master_weights=True)
    again.load_state_dict(saved(optimizer))
    equal(again.master_state_dict(model), there)


# --- And in again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_there_and_back_goes_on_with_the_same_bits(variant: str, dtype: torch.dtype) -> None:
    """In another process: the masters, and moments from the optimizer's own state."""
    model = Tied(dtype)
    optimizer = optimizer_of(model, variant)
    train(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.master_state_dict(model), file)
    file.seek(0)
    state = saved(optimizer)
    for entry in state["state"].values():
        entry.pop("remainder", None)
        entry.pop("master", None)
    other = Tied(dtype, seed=1)
    resumed = optimizer_of(other, variant)
    resumed.load_state_dict(state)
    resumed.load_master_state_dict(other, torch.load(file, weights_only=True))
    assert model_bits(other) == model_bits(model)
    equal(resumed.master_state_dict(other), optimizer.master_state_dict(model))
    train(optimizer, 2, first=4)
    train(resumed, 2, first=4)
    assert model_bits(other) == model_bits(model)
    assert state_bits(resumed) == state_bits(optimizer)


@pytest.mark.parametrize("through", ["nothing", "state_dict", "copy"])
@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_before_the_first_step(variant: str, dtype: torch.dtype, through: str) -> None:
    """A run that begins at fp32 weights has the bits of the same run in fp32."""
    start = {name: value.float() for name, value in Tied(torch.float32, seed=3).state_dict().items()}
    start["norm.num_batches_tracked"] = torch.tensor(7)
    model = Tied(dtype)
    optimizer = optimizer_of(model, variant)
    optimizer.load_master_state_dict(model, start)
    if through == "state_dict":
        state, optimizer = saved(optimizer), optimizer_of(model, variant)
        optimizer.load_state_dict(state)
    elif through == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    masters = optimizer.master_state_dict(model)
    for name, value in start.items():
        exact = not name.startswith("frozen")
        assert torch.equal(masters[name], value if exact else value.to(dtype)), name
    twin = Tied(torch.float32, seed=3)
    twin.frozen.to(dtype)
    theirs = optimizer_of(twin, "8bit" if "8bit" in variant else "32bit")
    train(optimizer, 4)
    train_alike(theirs, optimizer, 4)
    masters = optimizer.master_state_dict(model)
    for name, param in twin.named_parameters():
        if param.requires_grad:
            assert torch.equal(masters[name], param), name


@pytest.mark.parametrize("variant", ["auto", "8bit"])
def test_between_steps_moments_stay(variant: str) -> None:
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model, variant)
    train(optimizer, 2)
    before = saved(optimizer)["state"]
    masters = {name: value + 1e-4 for name, value in optimizer.master_state_dict(model).items()}
    masters["norm.num_batches_tracked"] = torch.tensor(3)
    optimizer.load_master_state_dict(model, masters)
    found = optimizer.master_state_dict(model)
    assert torch.equal(found["hidden.weight"], masters["hidden.weight"])
    assert int(model.norm.num_batches_tracked) == 3
    for key, entry in saved(optimizer)["state"].items():
        for part, value in entry.items():
            if part != "remainder":
                assert torch.equal(value, before[key][part])


@pytest.mark.parametrize("missing", ["head.weight", "embedding.weight", None])
def test_one_name_of_a_tied_weight_is_enough(missing: str | None) -> None:
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model)
    masters = Tied(torch.float32, seed=5).state_dict()
    masters = {name: value.clone() for name, value in masters.items() if name != missing}
    optimizer.load_master_state_dict(model, masters)
    assert torch.equal(optimizer.master_weight(model.head.weight), masters[next(iter(masters))]) or missing
    assert model.head.weight is model.embedding.weight


def test_odd_numbers_survive() -> None:
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 3.4e38, -3.4e38, 1e-45, 1 + 2**-9])
    for dtype in HALVES:
        layer = nn.Linear(9, 1, bias=False).to(dtype)
        optimizer = optimizer_of(layer)
        optimizer.load_master_state_dict(layer, {"weight": odd[None].double()})
        found = optimizer.master_weight(layer.weight)[0]
        assert torch.equal(found.view(torch.int32)[1:], odd.view(torch.int32)[1:])
        assert found[0].isnan()
        assert layer.weight[0, 0].isnan()


def test_other_dtypes_are_taken() -> None:
    for given in (torch.float64, torch.bfloat16, torch.float16):
        model = Tied(torch.bfloat16)
        optimizer = optimizer_of(model)
        values = {
            name: value.to(given) if value.is_floating_point() else value
            for name, value in Tied(torch.float32, seed=2).state_dict().items()
        }
        optimizer.load_master_state_dict(model, values)
        found = optimizer.master_state_dict(model)
        assert torch.equal(found["hidden.weight"], values["hidden.weight"].float())


def test_without_exact_weights_they_are_rounded_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model, master_weights=False)
    values = Tied(torch.float32, seed=2).state_dict()
    optimizer.load_master_state_dict(model, values)
    assert torch.equal(model.hidden.weight, values["hidden.weight"].bfloat16())
    assert "3 weights were rounded to 16 bits: master_weights is off" in caplog.text
    assert not optimizer.state


@pytest.mark.parametrize("source", [name for name in sources.SOURCES if not name.startswith("ours")])
@pytest.mark.parametrize("variant", ["auto", "32bit", "8bit"])
def test_beside_anybodys_moments(source: str, variant: str) -> None:
    """Loaded before the first step, when under "auto" nothing has a place yet."""
    _, optimizer = sources.trained(source)
    params = [
        nn.Parameter(p.detach().bfloat16()) for group in optimizer.param_groups for p in group["params"]
    ]
    model = nn.ParameterList(params)
    ours = AdamW(model.parameters(), variant=variant, master_weights=True)
    ours.load_state_dict(optimizer.state_dict())
    values = {name: torch.randn(value.shape) for name, value in model.state_dict().items()}
    ours.load_master_state_dict(model, values)
    equal(values, ours.master_state_dict(model))
    again = AdamW(model.parameters(), variant=variant, master_weights=True)
    again.load_state_dict(saved(ours))
    equal(values, again.master_state_dict(model))
    for each in (ours, again):
        each.param_groups[0]["lr"] = 0.0
    train(again, 1)
    equal(values, again.master_state_dict(model))


# --- Refusals ---------------------------------------------------------------------------------------------


def wrong(kind: str, values: dict[str, Any]) -> str:
    """What is done to the values, and what is said of it."""
    name = "hidden.weight"
    if kind == "missing":
        del values[name], values["head.weight"], values["embedding.weight"]
        return r"does not fit the model; missing: embedding\.weight, hidden\.weight"
    if kind == "unknown":
        values["module.x"] = torch.zeros(1)
        return r"does not fit the model; unknown: module\.x"
    if kind == "shape":
        values[name] = torch.zeros(64, 63)
        return r"'hidden\.weight' has shape \(64, 63\), expected \(64, 64\)"
    if kind == "dtype":
        values[name] = torch.zeros(64, 64, dtype=torch.int16)
        return r"'hidden\.weight' has dtype torch\.int16, expected floating numbers"
    if kind == "complex":
        values[name] = torch.zeros(64, 64, dtype=torch.complex64)
        return r"'hidden\.weight' has dtype torch\.complex64, expected floating numbers"
    if kind == "buffer":
        values["norm.num_batches_tracked"] = torch.tensor(1.5)
        return r"'norm\.num_batches_tracked' has dtype torch\.float32, expected whole numbers"
    if kind == "no tensor":
        values[name] = [1.0]
        return r"'hidden\.weight' is a list, not a tensor"
    if kind == "sparse":
        values[name] = torch.zeros(64, 64).to_sparse()
        return r"'hidden\.weight' has layout torch\.sparse_coo, expected torch\.strided"
    if kind == "meta":
        values[name] = torch.zeros(64, 64, device="meta")
        return r"'hidden\.weight': it is on the meta device"
    if kind == "tied":
        values["head.weight"] = values["embedding.weight"] + 1
        return r"'embedding\.weight' and 'head\.weight' are one weight of the model, and differ"
    raise AssertionError(kind)


KINDS = ("missing", "unknown", "shape", "dtype", "complex", "buffer", "no tensor", "sparse", "meta", "tied")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("variant", ["auto", "32bit", "paged_8bit"])
def test_a_refused_load_changes_nothing(variant: str, steps: int, kind: str) -> None:
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model, variant)
    train(optimizer, steps)
    before = model_bits(model), state_bits(optimizer), optimizer.memory()
    values = {name: value.clone() for name, value in Tied(torch.float32, seed=4).state_dict().items()}
    message = wrong(kind, values)
    with pytest.raises(ValueError, match=message):
        optimizer.load_master_state_dict(model, values)
    assert (model_bits(model), state_bits(optimizer), optimizer.memory()) == before


def test_what_is_no_state_dict() -> None:
    model = Tied(torch.bfloat16)
    with pytest.raises(ValueError, match="not a model's state_dict but a list"):
        optimizer_of(model).load_master_state_dict(model, [])  # type: ignore[arg-type]


def test_no_memory_for_the_state_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied(torch.bfloat16)
    optimizer = optimizer_of(model, "paged_8bit")
    before = model_bits(model)

    def none(*_: object) -> None:
        raise MemoryError("the host is full")

    monkeypatch.setattr(placing, "require_host", none)
    with pytest.raises(MemoryError):
        optimizer.load_master_state_dict(model, Tied(torch.float32, seed=4).state_dict())
    assert model_bits(model) == before
    assert not optimizer.state
    monkeypatch.undo()
    train(optimizer, 1)
