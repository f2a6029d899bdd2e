"""The fidelity suite: it sees what it is meant to see, and says so."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as dispatch
from bench import report, traces
from bench.peers import FLASH_CODECS, FORMATS, Codec, Format, FormulaAdamW
from bench.suites import fidelity, fidelity_report
from bench.suites.fidelity import Meter, Reference, Runner, compare, probe
from bench.suites.fidelity_report import Outcome, Result, adversarial_goal, main_goals
from bench.traces import ADVERSARIAL, Trace, subsample

BY_KEY = {format.key: format for format in FORMATS}
BY_NAME = {trace.name: trace for trace in ADVERSARIAL}
EXACT = Codec(1, lambda x: (x, x.new_empty(0)), lambda codes, scales: codes)
FORGETFUL = Codec(1, EXACT.encode, lambda codes, scales: torch.zeros_like(codes))
# 8 bits of mantissa, to nearest: a change of 0.1% is rounded away.
SWAMPED = Codec(1, lambda x: (x.bfloat16(), x.new_empty(0)), lambda codes, scales: codes.float())


def formula(key: str, m: Codec, v: Codec) -> Format:
    return Format(key, key, lambda p, lr, betas, eps: FormulaAdamW(p, lr, betas, eps, (m, v), min_size=0))


# --- The reference and the meter -----------------------------------------------------------------------


def test_reference_is_torchs_adamw_in_double_precision() -> None:
    p = torch.zeros(1000, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.0)
    reference = Reference(1000)
    for (gradient,) in BY_NAME["heavy tails"].gradients(0, 30):
        p.grad = gradient[:1000].double()
        p.data.zero_()
        optimizer.step()
        torch.testing.assert_close(reference.update(gradient[:1000]), -p.data / 1e-3, rtol=1e-12, atol=1e-14)


def test_runner_measures_the_update_exactly() -> None:
    """Parameters of zero: the change of a step has all the digits of fp32."""
    runner, reference = Runner(BY_KEY["torch fp32"], [4096, 50]), Reference(4146)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradients = [torch.randn(4096, generator=generator), torch.randn(50, generator=generator)]
        update, exact = runner.update(gradients), reference.update(torch.cat(gradients))
    torch.testing.assert_close(update, exact, rtol=1e-5, atol=1e-7)


def test_meter_by_hand() -> None:
    meter = Meter([2, 1], watched=torch.tensor([True, True, False]))
    meter.add(torch.tensor([1.0, -2.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]))
    meter.add(torch.tensor([0.0, 6.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    assert meter.largest == 6.0  # 9 is not watched
    assert meter.blow_ups == 2  # |9 - 0| > 2, |6 - 1| > 4; |-2 - 1| is not above 4
    assert meter.by_step().tolist() == [9 + 81, 25]
    assert meter.by_step(smallest=2).tolist() == [9, 25]


def test_meter_never_forgets_a_nan() -> None:
    meter = Meter([1])
    for update in (1.0, math.nan, 2.0):
        meter.add(torch.tensor([update]), torch.tensor([0.0]))
    assert math.isnan(meter.largest)
    assert meter.blow_ups == 1


# --- It tells good formats from bad ones ---------------------------------------------------------------


def test_broken_formats_show_a_larger_error() -> None:
    formats = [
        formula("exact", EXACT, EXACT),
        formula("flash", *FLASH_CODECS),
        formula("m forgotten", FORGETFUL, EXACT),
        formula("v swamped", EXACT, SWAMPED),
    ]
    got = compare(BY_NAME["normal"], formats, seed=0, steps=40).outcomes
    assert got["exact"].error < 1e-6
    assert 1e-3 < got["flash"].error < 0.1
    assert got["m forgotten"].error > 0.5
    assert got["v swamped"].error > 1e3 * got["exact"].error
    assert got["v swamped"].rolling[-1] > 2 * got["v swamped"].rolling[0]  # it gets worse and worse


def test_ours_follows_closely() -> None:
    formats = [BY_KEY["ours 32"], BY_KEY["ours 128"], BY_KEY["ours 256"], BY_KEY["flash"]]
    got = compare(BY_NAME["sparse rows"], formats, seed=0, steps=40).outcomes
    assert got["ours 32"].error < 1e-6
    assert got["ours 128"].error < got["ours 256"].error < 0.1 < got["flash"].error


def test_a_vanished_denominator_is_seen() -> None:
    """bitsandbytes' CUDA code rounds v to 0 and keeps m: an update of thousands of learning rates."""
    pytest.importorskip("bitsandbytes")
    result = compare(BY_NAME["zero denominator"], [BY_KEY["bnb CUDA"], BY_KEY["torch fp32"]], seed=0, steps=3)
    assert result.outcomes["bnb CUDA"].largest > 1000
    assert result.outcomes["torch fp32"].largest <= result.limit == 1.0


def outcome(error: float = 0.01, largest: float = 1.0) -> Outcome:
    return Outcome(error, error, largest, 0.0, [error])


@pytest.mark.parametrize(
    ("ours", "theirs", "met"),
    [
        (0.04, 0.1, [True, True]),
        (0.05, 0.2, [False, True]),
        (0.04, 0.07, [True, False]),
        (math.nan, 0.1, [False] * 2),
    ],
)
def test_main_goals(ours: float, theirs: float, met: list[bool]) -> None:
    result = Result(traces.MAIN, 1, 1.0, {"ours 128": outcome(ours), "bnb CUDA": outcome(theirs)})
    assert [goal.met for goal in main_goals(result)] == met


@pytest.mark.parametrize(
    ("largest", "met"), [(1.9, True), (2.1, False), (math.nan, False), (math.inf, False)]
)
@pytest.mark.parametrize("culprit", ["ours 32", "ours 128", "ours 256"])
def test_adversarial_goal_judges_each_of_ours(culprit: str, largest: float, met: bool) -> None:
    outcomes = {format.key: outcome() for format in FORMATS} | {culprit: outcome(largest=largest)}
    assert adversarial_goal(Result(BY_NAME["normal"], 1, 1.0, outcomes)).met is met


def test_a_peer_that_cannot_run_says_why_but_ours_may_not_fail() -> None:
    def fails(parameters: list[Tensor], lr: float, betas: tuple[float, float], eps: float) -> FormulaAdamW:
        raise RuntimeError("no such device\nand a long story")

    sizes, reasons = probe([Format("peer", "peer", fails), BY_KEY["flash"]])
    assert sizes == {"flash": 2.125}
    assert reasons == {"peer": "RuntimeError: no such device"}
    with pytest.raises(RuntimeError, match="no such device"):
        probe([Format("ours", "ours", fails, ours=True)])


# --- Traces --------------------------------------------------------------------------------------------


def collect(trace: Trace, seed: int = 0, steps: int = 6) -> Tensor:
    return torch.stack([gradients[0] for gradients in trace.gradients(seed, steps)])


@pytest.mark.parametrize("trace", ADVERSARIAL, ids=lambda trace: trace.name)
def test_adversarial_traces_are_functions_of_their_seed(trace: Trace) -> None:
    first = collect(trace)
    assert first.shape == (6, 65536)
    assert first.dtype == torch.float32
    assert torch.isfinite(first).all()
    assert torch.equal(first, collect(trace))
    if trace.name != "zero denominator":  # that one has nothing random
        assert not torch.equal(first, collect(trace, seed=1))


def test_sparse_traces_are_sparse() -> None:
    rows = collect(BY_NAME["sparse rows"], steps=50).view(50, 64, 1024).ne(0)
    assert torch.equal(rows.any(2), rows.all(2))
    assert rows.any(2).double().mean() == pytest.approx(0.04, abs=0.01)
    assert collect(BY_NAME["sparse 1%"]).ne(0).double().mean() == pytest.approx(0.01, abs=1e-3)


def test_traces_change_at_mid_run() -> None:
    drop = collect(BY_NAME["100x drop"]).abs().median(dim=1).values
    assert drop[3:].mean() == pytest.approx(float(drop[:3].mean()) / 100, rel=0.05)
    dead = collect(BY_NAME["dead half"]).eq(0).double().mean(1)
    assert dead[:3].max() == 0
    assert dead[3:].tolist() == pytest.approx([0.5] * 3, abs=0.01)
    assert torch.equal(collect(BY_NAME["dead half"])[3].eq(0), collect(BY_NAME["dead half"])[5].eq(0))


def test_zero_denominator_starves_all_but_the_large_elements() -> None:
    trace = BY_NAME["zero denominator"]
    gradients = collect(trace)
    assert gradients[:, ~trace.watched].eq(1).all()
    assert gradients[0, trace.watched].eq(torch.tensor(3e-4)).all()
    assert gradients[1:, trace.watched].eq(0).all()
    assert (~trace.watched).view(-1, 128).any(1).all()  # every block of 128 has a large element


@pytest.mark.parametrize(
    ("size", "kept"), [(100, 100), (4095, 4095), (4096, 4096), (16384, 4096), (65536, 8192)]
)
def test_subsample(size: int, kept: int) -> None:
    got = subsample(torch.arange(size))
    assert got.numel() == kept
    if size >= 4096:
        assert torch.equal(got.view(-1, 1024)[:, 1:], got.view(-1, 1024)[:, :-1] + 1)  # whole runs


def test_main_trace_is_the_training_of_the_demo_model() -> None:
    runs = [list(traces.MAIN.gradients(seed, 2)) for seed in (0, 0, 1)]
    for one, same in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(one, same)
    assert not torch.equal(runs[0][0][0], runs[2][0][0])
    sizes = [gradient.numel() for gradient in runs[0][0]]
    assert sum(size >= 4096 for size in sizes) > 5
    assert sum(sizes) < 150_000


# --- Report and command line ---------------------------------------------------------------------------


def test_number() -> None:
    values = (0.02, 2, 123.4, 12649.4, 1.54e-7, 0, math.nan, math.inf)
    expected = ["0.0200", "2.00", "123", "12,649", "1.54e-07", "0.00", "NaN", "infinite"]
    assert [report.number(value) for value in values] == expected


def test_markdown_escapes_and_emphasizes() -> None:
    table = report.Table("T", ["a", "|u|"], [["x", report.Cell("1", "bad")]], ["note"])
    assert report.markdown(table) == "## T\n\n| a | \\|u\\| |\n|---|---:|\n| x | **1** |\n\n- note\n"


def test_save_writes_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    run = report.environment("fidelity", ["--quick"], seed=3)
    assert run["command"] == "python -m bench fidelity --quick"
    files = report.save(tmp_path / "new", "name", run, [], {"x": [1.0, math.nan, {"y": math.inf}]})
    assert [file.name for file in files] == ["name.json", "name.md"]
    assert json.loads(files[0].read_text())["x"] == [1.0, None, {"y": None}]


def test_whole_suite_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuple(BY_KEY[key] for key in ("torch fp32", "ours 32", "ours 128", "ours 256", "flash"))
    for module in (fidelity, fidelity_report):
        monkeypatch.setattr(module, "FORMATS", kept)
    code = dispatch.main(["fidelity", "--quick", "--steps", "4", "--out", str(tmp_path)])
    saved = json.loads((tmp_path / "fidelity.json").read_text())
    assert code == (0 if all(goal["met"] for goal in saved["goals"]) else 1)
    assert set(saved["traces"]) == {"byte transformer", *fidelity.QUICK_TRACES}
    assert saved["traces"]["byte transformer"]["formats"]["ours 128"]["error"] < 0.045
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000
    assert "adamw_triton 8-bit, block 128" in (tmp_path / "fidelity.md").read_text()


def test_dispatch(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.main(["--help"]) == 0
    assert "fidelity" in capsys.readouterr().out
    assert dispatch.main([]) == 2
    assert dispatch.main(["nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    for name in dispatch.SUITES | dispatch.PROOFS | dispatch.COMMANDS:
        assert importlib.util.find_spec(dispatch.home(name)), name


def test_a_trace_yields_as_many_steps_as_asked() -> None:
    assert sum(1 for _ in BY_NAME["normal"].gradients(0, 7)) == 7
    assert len(list(itertools.islice(BY_NAME["normal"].gradients(0, 100), 3))) == 3
