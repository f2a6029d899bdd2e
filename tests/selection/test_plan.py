"""``adamw_triton.plan``: what it counts, what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import adamw_triton
from adamw_triton.cli import main
from adamw_triton.selection import auto, planning
from adamw_triton.selection.cards import find_card
from adamw_triton.selection.plans import Plan
from adamw_triton.state.placement import BUCKET_BYTES, largest_ring

MiB, GiB = 1 << 20, 1 << 30
MEMORY: dict[str, Any] = {"gpu_memory": "16GiB", "host_memory": "32GiB", "activations": 0}


def spent(plan: Plan) -> dict[str, int]:
    return dict(plan.limits[0].spent)


def test_weights_gradients_and_the_rest_are_taken_off() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(1000)).to(torch.bfloat16)
    for param in model[1].parameters():
        param.requires_grad_(False)
    plan = adamw_triton.plan(model, "16GiB", "32GiB", activations="1GiB")
    trained = 1001 * 1000
    assert spent(plan) == {
        "memory": 16 * GiB,
        "driver and other processes": planning.CONTEXT,
        "weights": 2 * (trained + 2000) + 2 * 2000 + 8,  # the running statistics, and a count of 8 bytes
        "gradients": 2 * trained,
        "activations": GiB,
        "slack": int(0.02 * 16 * GiB),
    }
    memory, *rest = spent(plan).values()
    assert plan.limits[0].room == memory - sum(rest)
    assert plan.candidates[0].gpu_bytes == (8 + 2) * (1000 * 1000 + 1024)


FORMS: dict[str, Any] = {
    "parameters": lambda params: params,
    "a generator": iter,
    "named parameters": lambda params: [(str(index), param) for index, param in enumerate(params)],
    "groups": lambda params: [{"params": params[:1]}, {"params": params[1:]}],
    "a group of one": lambda params: [{"params": params[0]}, {"params": iter(params[1:])}],
    "groups of named parameters": lambda params: [{"params": [("a", params[0]), ("b", params[1])]}],
    "a module": lambda params: nn.ParameterList(params),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_that_an_optimizer_takes(form: str) -> None:
    params = [Parameter(torch.empty(5000, device="meta")), Parameter(torch.empty(70, 70, device="meta"))]
    plan = adamw_triton.plan(FORMS[form](params), **MEMORY)
    assert spent(plan)["weights"] == spent(plan)["gradients"] == 4 * 9900
    assert plan.candidates[0].gpu_bytes == 8 * (5024 + 4928)


def test_what_groups_ask_for_is_kept() -> None:
    params = [Parameter(torch.empty(2**20, device="meta")) for _ in range(3)]
    groups = [
        {"params": params[0], "state_bits": 32},
        {"params": params[1], "amsgrad": True},
        {"params": params[2]},
    ]
    plan = adamw_triton.plan(groups, **MEMORY)
    assert plan.candidates[0].gpu_bytes == (8 + 12 + 8) * 2**20
    assert plan.candidates[1].gpu_bytes == (8 + 12 + 2 + 4 / 128) * 2**20


def test_released_gradients_are_few_at_one_time() -> None:
    params = [
        Parameter(torch.empty(n, dtype=torch.bfloat16, device="meta")) for n in (10**8, 10**6, 10**8, 5)
    ]
    released = spent(adamw_triton.plan(params, **MEMORY, gradient_release=True))
    assert released["gradients at one time"] == 2 * BUCKET_BYTES + 2 * 10**8
    few = spent(adamw_triton.plan(params[1:2], **MEMORY, gradient_release=True))
    assert few["gradients at one time"] == 2 * 10**6


def test_gradients_that_add_up_on_the_host() -> None:
    """Few are on the GPU; the host has their sums, and the link moves them in each micro-batch."""
    params = [Parameter(torch.empty(n, dtype=torch.bfloat16, device="meta")) for n in (10**8, 10**6, 65)]
    memory: dict[str, Any] = {"gpu_memory": "4090", "host_memory": "64GiB", "gradient_release": True}
    numel = 10**8 + 10**6 + 128
    without = adamw_triton.plan(params, **memory)
    for dtype, itemsize in ((None, 2), (torch.float32, 4)):
        how: dict[str, Any] = {"accumulate_on": "host", "accumulate_dtype": dtype}
        found = adamw_triton.plan(params, **memory, accumulation=8, **how)
        assert spent(found)["gradients at one time"] == spent(without)["gradients at one time"]
        for one, other in zip(found.candidates, without.candidates, strict=True):
            assert one.host_bytes - other.host_bytes == itemsize * numel
            assert 0.999 * largest_ring() < one.staging_bytes - other.staging_bytes <= largest_ring()
        link = found.limits[0].link
        paged = [plan.candidates[3] for plan in (found, without)]
        assert paged[0].seconds - paged[1].seconds == pytest.approx(8 * itemsize * numel / link)
        assert "Gradients of 8 micro-batches add up in host memory: " in str(found)
        assert adamw_triton.plan(params, **memory, accumulation=1, **how) == without
    on_gpu = adamw_triton.plan(params, **memory, accumulation=8)
    assert spent(on_gpu)["gradients"] == 2 * (10**8 + 10**6 + 65)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulation": 0}, "Invalid accumulation: 0"),
        ({"accumulation": True}, "Invalid accumulation: True"),
        ({"accumulate_on": "host"}, "needs gradient_release=True"),
        ({"accumulate_on": "disk"}, "Invalid accumulate_on: 'disk'"),
        ({"accumulate_dtype": torch.float32}, "needs accumulate_on='host'"),
    ],
)
def test_accumulation_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw_triton.plan([Parameter(torch.empty(10, device="meta"))], **MEMORY, **arguments)


def test_gradients_of_another_dtype() -> None:
    params = [Parameter(torch.empty(1000, dtype=torch.bfloat16, device="meta"))]
    assert spent(adamw_triton.plan(params, **MEMORY))["gradients"] == 2000
    assert spent(adamw_triton.plan(params, **MEMORY, grad_dtype=torch.float32))["gradients"] == 4000


def test_a_card_brings_its_memory_and_its_rates() -> None:
    plan = adamw_triton.plan([Parameter(torch.empty(10, device="meta"))], "rtx 4090", "1GiB")
    card = find_card("RTX 4090")
    assert spent(plan)["memory"] == card.memory
    assert (plan.limits[0].bandwidth, plan.limits[0].link) == (card.bandwidth, card.link)
    assert "RTX 4090" in str(plan)


def test_activations_that_are_not_given_are_said_to_be_missing() -> None:
    params = [Parameter(torch.empty(10, device="meta"))]
    assert "Activations are not counted" in str(adamw_triton.plan(params, "T4", "1GiB"))
    assert "Activations are not counted" not in str(adamw_triton.plan(params, "T4", "1GiB", activations=0))


def test_the_hosts_memory_is_this_machines_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from adamw_triton.memory import host as memory

    params = [Parameter(torch.empty(10, device="meta"))]
    monkeypatch.setattr(planning, "host_limit", lambda: memory.Limit(12345, "the control group /jail"))
    assert adamw_triton.plan(params, "T4").host_room == 12345
    monkeypatch.setattr(planning, "host_limit", lambda: None)
    with pytest.raises(ValueError, match="give host_memory"):
        adamw_triton.plan(params, "T4")


PARAM = [Parameter(torch.empty(10, device="meta"))]
REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "model_or_params has no parameters"),
    (torch.empty(3), {}, TypeError, "not one tensor"),
    ([3], {}, TypeError, "a int where a tensor should be"),
    ([Parameter(torch.empty(3, dtype=torch.float64))], {}, TypeError, "dtype torch.float64"),
    (PARAM, {"gpu_memory": "T5"}, ValueError, r"'T5'.*'T4'"),
    (PARAM, {"gpu_memory": "24Gigs"}, ValueError, "gpu_memory: '24Gigs'"),
    (PARAM, {"gpu_memory": "-24GiB"}, ValueError, "gpu_memory: '-24GiB'"),
    (PARAM, {"gpu_memory": -1}, ValueError, "gpu_memory: -1"),
    (PARAM, {"host_memory": "much"}, ValueError, "host_memory: 'much'"),
    (PARAM, {"activations": -5}, ValueError, "activations: -5"),
    (PARAM, {"prefer": "small"}, ValueError, "prefer: 'small'"),
    (PARAM, {"block_size": 100}, ValueError, "block_size: 100; it must be 128 or 256"),
]


@pytest.mark.parametrize(("params", "arguments", "error", "message"), REFUSED)
def test_bad_arguments(params: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adamw_triton.plan(params, **{**MEMORY, **arguments})


TEXTS = (
    "24",
    "4090",
    "16",
    "tesla t4",
    "24GiB",
    "80 GB",
    "T5",
    "A100",
    "",
    "-24GiB",
    "24Gigs",
    "0GiB",
    "5MB",
    "lots",
)


ODD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a number": (
        1.5,
        {},
        "not 1.5; a number of parameters is planned for by `adamw-triton plan --params 1.5B`",
    ),
    "a large number": (7e9, {}, "not 7000000000.0; a number"),
    "text": ("7B", {}, "not '7B'; a number of parameters is planned for by"),
    "nothing": (None, {}, "model_or_params must be a module or an iterable of parameters, not None"),
    "a tensor": (PARAM[0], {}, "not one tensor"),
    "a group without params": ([{"p": 1}], {}, "has a group without 'params'; it has ['p']"),
    "a group of a number": ([{"params": 1.5}], {}, "has a float where a tensor should be"),
    "half a pair": ([("a",)], {}, "has a tuple where a tensor should be"),
    "a dtype's name": (PARAM, {"grad_dtype": "bf16"}, "grad_dtype must be a torch.dtype or None, not 'bf16'"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_cannot_be_planned_for_is_named(case: str) -> None:
    what, options, message = ODD[case]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        adamw_triton.plan(what, "T4", "1GiB", **options)


@pytest.mark.parametrize("text", TEXTS)
def test_text_means_the_same_as_on_the_command_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the GPU; the same plan, or the same refusal but for the argument's name."""
    try:
        here: object = adamw_triton.plan(PARAM, text, "1GiB", activations=0).limits[0]._asdict()["device"]
    except ValueError as error:
        here = str(error).replace("gpu_memory", "--gpu")
    code = main(["plan", "--params", "1000", f"--gpu={text}", "--host-memory", "1GiB", "--json"])
    output = capsys.readouterr()
    if code == 2:
        assert output.err == f"adamw-triton plan: {here}\n"
    else:
        assert json.loads(output.out)["plan"]["devices"][0]["device"] == here


@pytest.mark.parametrize("name", ["gpu_memory", "host_memory", "activations"])
def test_a_small_number_without_a_unit_is_no_memory(name: str) -> None:
    """Gibibytes were meant. As a number it is bytes, as everywhere."""
    with pytest.raises(ValueError, match=f"Invalid {name}: '24' has no unit and means bytes"):
        adamw_triton.plan(PARAM, **{**MEMORY, name: "24"})


def test_on_a_cpu_the_room_is_what_the_machine_has() -> None:
    param = Parameter(torch.ones(5000))
    optimizer = adamw_triton.AdamW([param])
    param.grad = torch.ones(5000)
    optimizer.step()
    assert optimizer.plan is not None
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < optimizer.plan.to_dict()["devices"][0]["room"] <= there
    assert optimizer.plan.to_dict()["host_room"] <= there


def test_memory_that_nobody_tells_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc."""
    monkeypatch.setattr(auto, "host_limit", lambda: None)
    param = Parameter(torch.ones(5000))
    optimizer = adamw_triton.AdamW([param])
    param.grad = torch.ones(5000)
    optimizer.step()
    assert optimizer.plan is not None
    told = optimizer.plan.to_dict()
    assert (told["devices"][0]["room"], told["host_room"]) == (None, None)
    assert str(optimizer.plan).startswith("cpu: an unknown amount for optimizer state\n")
    assert "TiB" not in str(optimizer.plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_has_to_be_named() -> None:
    with pytest.raises(ValueError, match=r"no GPU here.*gpu_memory='T4'"):
        adamw_triton.plan(PARAM)


@pytest.mark.gpu
@pytest.mark.alone
def test_the_gpu_that_is_here_is_measured() -> None:
    model = nn.Linear(1000, 1000, device="cuda")
    plan = adamw_triton.plan(model, activations=0)
    assert spent(plan)["memory"] == torch.cuda.mem_get_info()[1]
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert plan.limits[0].room <= torch.cuda.mem_get_info()[0] + cached
    assert plan.chosen is not None


def test_a_table_for_people() -> None:
    rich = pytest.importorskip("rich.console")
    plan = adamw_triton.plan(PARAM, **MEMORY)
    console = rich.Console(width=100, record=True, file=io.StringIO())
    console.print(plan)
    shown = console.export_text()
    for text in (shown, str(plan)):
        assert "→" in text
        assert "chosen: the first that fits" in text
        assert "16.0 GiB" in text
    page = plan._repr_html_()
    assert page.count("<tr>") == 7
    assert page.count("font-weight: bold") == 6


def test_the_guides_plan_is_what_is_printed() -> None:
    """Llama-3.2-3B in 16 bits, all of it trained, on a T4."""
    shapes = [
        (3072, 3072),
        (1024, 3072),
        (1024, 3072),
        (3072, 3072),
        (8192, 3072),
        (8192, 3072),
        (3072, 8192),
    ]
    shapes = [(128256, 3072), *([*shapes, (3072,), (3072,)]) * 28, (3072,)]
    llama_3b = [Parameter(torch.empty(shape, dtype=torch.float16, device="meta")) for shape in shapes]
    assert sum(param.numel() for param in llama_3b) == 3_212_749_824
    plan = adamw_triton.plan(llama_3b, gpu_memory="T4", host_memory="25GiB", activations="1GiB")
    page = Path(__file__).parents[2] / "docs" / "guides" / "which_variant.md"
    call = 'plan(llama_3b, gpu_memory="T4", host_memory="25GiB", activations="1GiB"))\n'
    shown = page.read_text().partition(call)[2].partition("```")[0]
    assert shown.rstrip("\n") == str(plan)


def test_a_parameter_counts_once_and_what_has_no_size_is_named() -> None:
    weight = Parameter(torch.ones(100, 100))
    assert adamw_triton.plan([weight, weight], "1GiB", "1GiB") == adamw_triton.plan([weight], "1GiB", "1GiB")
    with pytest.raises(ValueError, match="a parameter of a lazy module, whose shape is not known yet"):
        adamw_triton.plan(nn.LazyLinear(3), "1GiB", "1GiB")
    with pytest.raises(TypeError, match=r"a parameter of layout torch\.sparse_coo"):
        adamw_triton.plan([torch.eye(3).to_sparse()], "1GiB", "1GiB")
