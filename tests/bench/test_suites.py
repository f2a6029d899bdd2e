"""The suites: every one runs in a small form, and sees what it is meant to see."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.__main__
from adamw_triton.installing import missing
from adamw_triton_kernels import Call, Update, reference
from bench import optimizers, readme, timing, workloads
from bench.commands import PACKAGES
from bench.optimizers import OPTIMIZERS, Optimizer, hand_over, runnable, told
from bench.peers import FORMATS, Codec, Format, FormulaAdamW
from bench.suites import convergence, memory, paged, precision, roofline, step, train

ROOT = Path(__file__).resolve().parents[2]
BY_KEY = {one.key: one for one in OPTIMIZERS}
EXACT = Codec(1, lambda x: (x, x.new_empty(0)), lambda codes, scales: codes)
FORGETFUL = Codec(1, EXACT.encode, lambda codes, scales: torch.zeros_like(codes))

# --- All of them, small --------------------------------------------------------------------------------

SMALL = 1 << 16


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of a second or two; nothing is compiled."""
    for suite in (step, paged, train):
        monkeypatch.setattr(suite, "compiled_after", lambda elements: contextlib.nullcontext())
    quick = [one for one in OPTIMIZERS if one.library != "torchao" or one.needs]
    for suite in (step, paged, train, memory):
        monkeypatch.setattr(suite, "OPTIMIZERS", quick, raising=False)
    monkeypatch.setattr(step, "ROWS", [one for one in quick if not one.paged])
    case = step.Case("small", workloads.one(SMALL), "fp32", 3)
    monkeypatch.setattr(step, "cases", lambda device, quick: [case])
    monkeypatch.setattr(timing, "COPIED", 1 << 20)
    monkeypatch.setattr(paged, "COPIED", 1 << 20)
    monkeypatch.setitem(paged.ELEMENTS, "quick", SMALL * 8)
    monkeypatch.setitem(paged.BUDGET, "cpu", 1 << 20)
    monkeypatch.setitem(memory.ELEMENTS, "quick", SMALL * 16)
    llama = workloads.Llama(64, 1, batch=1, context=16)
    monkeypatch.setattr(train, "task", lambda device, quick, seed: train.Task(llama, 4, device, seed))
    tiny = convergence.Task(width=16, depth=1, batch=2, context=16, steps=2)
    monkeypatch.setattr(convergence, "Task", lambda **_: tiny)
    little = precision.Task(width=16, depth=1, batch=2, context=16, steps=4)
    monkeypatch.setattr(precision, "Task", lambda **_: little)


SMALL_SUITES = ("step", "paged", "memory", "train", "convergence", "precision", "roofline", "telemetry")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_SUITES)
@pytest.mark.usefixtures("small")
def test_every_suite_leaves_a_table_a_plot_and_its_figures(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert importlib.import_module(f"bench.suites.{name}").main(["--quick", "--out", str(tmp_path)]) in (0, 1)
    written = {path.name: path for path in tmp_path.iterdir()}
    assert set(written) == {f"{name}.json", f"{name}.md", f"{name}.png"}
    assert written[f"{name}.png"].stat().st_size > 10_000
    run = json.loads(written[f"{name}.json"].read_text())["run"]
    assert run["versions"]["torch"]
    assert {"seed", "device", "clocks", "commit", "date"} <= set(run)
    if name not in ("convergence", "precision", "roofline", "memory", "telemetry"):
        page = written[f"{name}.md"].read_text()
        missing = "bitsandbytes paged 8-bit" if name != "step" else "flashoptim 8-bit"
        assert f"{missing} cannot run here: it needs" in page or torch.cuda.is_available()


@pytest.mark.parametrize(("dtype", "kept"), [("bf16", True), ("fp32", False)])
def test_exact_weights_are_timed_where_there_is_something_to_keep(dtype: str, kept: bool) -> None:
    ours = [BY_KEY["adamw_triton 32bit"], optimizers.EXACT[0]]
    case = step.Case("small", workloads.one(SMALL), dtype, 3)
    found = step.measure(case, ours, "cpu", 0)
    assert list(found.measured) == [one.key for one in ours[: 1 + kept]]
    assert not found.reasons
    rows = step.goals([found]).rows
    assert [row[0] for row in rows] == ["adamw_triton 32bit, exact / adamw_triton 32bit"] * kept
    if kept:
        bytes_of = [found.measured[one.key].bytes_per_element for one in ours]
        assert bytes_of == [22.0, 26.0]


# --- They see what is wrong ----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="slows the CPU's update")
def test_a_slowed_kernel_shows_in_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step.Case("small", workloads.one(SMALL), "fp32", 5)
    rows = [BY_KEY["adamw_triton 32bit"], BY_KEY["torch foreach"]]
    ours, theirs = (row.key for row in rows)
    honest = step.measure(case, rows, "cpu", 0)
    update = reference.adamw_32bit

    def slowed(*arguments: Any) -> Call:
        time.sleep(20 * honest.measured[ours].spread.max)
        return update.prepare(*arguments)

    monkeypatch.setattr(reference, "adamw_32bit", Update(slowed))
    found = step.measure(case, rows, "cpu", 0)
    assert found.ratio(ours, theirs) > 3 * honest.ratio(ours, theirs)
    table = step.goals(
        [step.Result(step.Case("1e7", workloads.one(1 << 24), "fp32"), found.measured, {}, 1e9)]
    )
    assert [row[-1].text for row in table.rows] == ["missed"]


def formula(key: str, m: Codec, v: Codec) -> Format:
    return Format(key, key, lambda p, lr, betas, eps: FormulaAdamW(p, lr, betas, eps, (m, v), min_size=0))


@pytest.mark.slow
def test_a_broken_format_does_not_converge() -> None:
    """m is forgotten: no momentum is left, and the bias correction makes a tenth of the steps."""
    task = convergence.Task(width=32, depth=1, batch=4, context=32, steps=60)
    formats = [FORMATS[0], formula("exact", EXACT, EXACT), formula("broken", FORGETFUL, EXACT)]
    found = convergence.losses(task, formats, range(2), "cpu")
    assert convergence.band(found) > 0
    assert not convergence.outside(found, "exact")
    assert convergence.outside(found, "broken")


def test_a_loss_that_is_not_a_number_is_outside() -> None:
    found = {convergence.BASE: [1.0, 1.0], convergence.AGAIN: [1.1, 0.9], "bad": [float("nan"), 1.0]}
    assert convergence.band(found) == pytest.approx(0.1)
    assert convergence.outside(found, "bad")


# --- Parts ---------------------------------------------------------------------------------------------


def test_a_peer_that_cannot_run_says_why_and_ours_has_to_run() -> None:
    def refuse(params: list[torch.Tensor], lr: float, decay: float) -> Any:
        raise OSError("no such library\nand more")

    def nothing(params: list[torch.Tensor], lr: float, decay: float) -> Any:
        return torch.optim.AdamW(params, lr=0.0)

    rows = [Optimizer("a", refuse, "peer", 8), Optimizer("b", nothing, "peer", 8), BY_KEY["torch fused"]]
    found, reasons = runnable(rows, "cpu")
    assert [one.key for one in found] == ["torch fused"]
    assert reasons == {"a": "OSError: no such library", "b": "its step leaves the parameter as it was"}
    with pytest.raises(OSError, match="no such library"):
        runnable([Optimizer("ours", refuse, "adamw-triton", 8)], "cpu")


def test_what_goes_wrong_with_a_peer_is_told_and_with_ours_is_an_error() -> None:
    ours, peer = BY_KEY["adamw_triton 32bit"], BY_KEY["torch fused"]
    reasons: dict[str, str] = {}
    with told(peer, reasons):
        raise ValueError("it broke\nin many ways")
    with told(ours, reasons):
        raise torch.OutOfMemoryError("too much")
    assert reasons == {peer.key: "ValueError: it broke", ours.key: "out of memory: too much"}
    with pytest.raises(ValueError, match="it broke"), told(ours, reasons):
        raise ValueError("it broke")


def test_gradients_are_handed_over_to_hooks() -> None:
    """As torchao's CPU offload needs them, which sees nothing of gradients that are merely there."""
    params = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    seen: list[torch.Tensor] = []
    params[0].register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    params[0].grad = torch.full((3,), 2.0)
    for count in (1, 2):
        hand_over(params)
        assert len(seen) == count
        assert seen[-1].equal(torch.full((3,), 2.0))
        assert params[0].grad is not None
        assert params[0].grad.equal(seen[-1])
    assert params[1].grad is None


def test_managed_memory_is_asked_for_only_where_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(optimizers, "_managed", 0)
    paged_8bit = BY_KEY["bitsandbytes paged 8-bit"]
    params = [torch.ones(200_000, requires_grad=True), torch.ones(50_000, requires_grad=True)]
    for free, refused in ((900_000, False), (1_500_000, True), (1_700_000, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 1 << 34))
        if refused:
            with pytest.raises(torch.OutOfMemoryError, match="managed memory"):
                paged_8bit.build(params, 1e-3, 0.0)
        else:
            paged_8bit.build(params, 1e-3, 0.0)
    assert optimizers._managed == 2 * 400_000  # small tensors are not paged, and what was asked for stays


def test_every_round_times_every_function_in_an_order_drawn_anew() -> None:
    calls: list[str] = []
    clock = iter(range(1000))

    class Timer(timing.Timer):
        def __call__(self, function: Any) -> float:
            function()
            return float(next(clock))

    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    spreads = timing.interleaved(functions, 8, Timer("cpu"))
    rounds = [tuple(calls[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert {spread.rounds for spread in spreads.values()} == {8}
    assert timing.Spread.of([3.0, 1.0, 2.0, 9.0, 4.0]).median == 3.0


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("adamw_triton 32bit", 8 << 20),
        ("adamw_triton 8bit", (2 << 20) + (4 << 13)),
        ("adamw_triton paged_32bit", (16 << 20)),  # all of it fits in one staging buffer
        ("torch fused", None),
    ],
)
def test_memory_predicts_by_the_optimizers_own_placement(key: str, host: int | None) -> None:
    predicted = memory.predicted(BY_KEY[key], [1 << 16] * 16, "cpu")
    assert predicted == (None if host is None else memory.Bytes(0, host))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts resident pages there")
def test_memory_measures_what_a_step_takes() -> None:
    """In a process of its own, as the suite is: another test's freed memory would be used anew."""
    code = (
        "from bench import optimizers\n"
        "from bench.suites import memory\n"
        "memory.give_freed_memory_back()\n"
        "fused = next(one for one in optimizers.OPTIMIZERS if one.key == 'torch fused')\n"
        "found = memory.measured(fused, [(1 << 20,)] * 4, 'cpu', 0)\n"
        "print(found.gpu, found.host)"
    )
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    on_gpu, on_host = map(int, done.stdout.split())
    assert on_gpu == 0
    assert on_host == pytest.approx(8 << 22, rel=0.15)


def test_a_projection_is_the_longer_of_its_two_bounds() -> None:
    gpu = roofline.Gpu("G", "sm_0", bandwidth=1e12, units=10, lanes=100, clock=1e9, source="")
    memory_bound = roofline.project(gpu, instructions=5, moved=10)
    assert (memory_bound.memory, memory_bound.issue) == (pytest.approx(0.01), pytest.approx(0.005))
    assert memory_bound.bound == "memory"
    assert roofline.project(gpu, instructions=50, moved=10).seconds == pytest.approx(0.05)
    counts = roofline.audited()
    assert set(counts) >= {(kernel, gpu.target) for kernel in roofline.KERNELS for gpu in roofline.GPUS}


def test_the_readme_is_made_of_the_results(tmp_path: Path) -> None:
    for machine in ("aot", "cpu-some"):
        folder = tmp_path / "results" / machine
        folder.mkdir(parents=True)
        (folder / "step.md").write_text(f"# step\n\nof {machine}\n\n![step](step.png)\n\n## A table\n")
    assert readme.main(["--results", str(tmp_path / "results")]) == 0
    page = (tmp_path / "README.md").read_text()
    assert page.index("## Measured: cpu-some") < page.index("## Compiled or projected, not measured")
    assert "### step\n\nof cpu-some\n\n![step](results/cpu-some/step.png)\n\n#### A table" in page


# --- Without its libraries -------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["step", "--quick"])
def test_a_missing_library_is_named_with_its_extra(
    package: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.part")

    monkeypatch.setattr(importlib, "import_module", without)
    assert bench.__main__.main([name]) == 2
    assert capsys.readouterr().err == f"bench {name}: {missing(package, 'bench')}\n"


def test_a_module_of_ours_that_is_missing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ModuleNotFoundError):
        bench.__main__.main(["step"])
