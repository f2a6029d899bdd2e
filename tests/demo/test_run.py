"""The demo end to end, on a tiny model and little text."""

import io
import statistics
from functools import partial
from pathlib import Path

import matplotlib.image
import pytest
import torch
from rich.console import Console

from adamw_triton.demo import OPTIMIZERS, DemoError, report, training
from adamw_triton.demo.model import ByteTransformer
from adamw_triton.demo.run import run_demo


@pytest.fixture
def tiny(monkeypatch):
    corpus = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8)
    monkeypatch.setattr("adamw_triton.demo.run.load_corpus", lambda: corpus)
    monkeypatch.setattr(
        "adamw_triton.demo.run.ByteTransformer", partial(ByteTransformer, width=64, depth=1, heads=2)
    )


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=80)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_every_optimizer_gets_a_result_a_row_and_a_curve(tmp_path, console):
    picture = tmp_path / "loss.png"
    results = run_demo(steps=3, out=picture, device="cpu", console=console)

    assert tuple(result.name for result in results) == OPTIMIZERS
    for result in results:
        assert len(result.losses) == 3
        assert result.losses[0] == results[0].losses[0]  # one start, one first batch
        assert result.train_loss == pytest.approx(statistics.fmean(result.losses))
        assert 2 < result.validation_loss < 7
        assert result.seconds_per_step > 0

    rows = console.file.getvalue().splitlines()
    names = ("torch.optim.AdamW", *(f"adamw_triton {name}" for name in OPTIMIZERS[1:]))
    for name, result in zip(names, results, strict=True):
        figures = [
            f"{result.train_loss:.4f}",
            f"{result.validation_loss:.4f}",
            f"{result.state_bytes_per_parameter:.3f}",
            f"{result.seconds_per_step:.4f}",
        ]
        assert [*name.split(), *figures] in [row.split() for row in rows]

    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (900, 1200)
    assert pixels.std() > 0.01


@pytest.mark.usefixtures("tiny")
def test_8bit_state_is_about_a_quarter_of_torchs(tmp_path, console):
    torchs, ours = run_demo(steps=1, out=tmp_path / "a.png", variants=("torch", "8bit"), console=console)
    assert torchs.state_bytes_per_parameter == 8  # two float32 moments
    assert 2 < ours.state_bytes_per_parameter < 3


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("bits", ["32bit", "8bit"])
def test_paging_changes_nothing_but_the_place(bits, tmp_path, console):
    variants = (bits, f"paged_{bits}")
    resident, paged = run_demo(steps=4, out=tmp_path / "a.png", variants=variants, console=console)
    assert paged.losses == resident.losses
    assert paged.validation_loss == resident.validation_loss
    assert paged.state_bytes_per_parameter == resident.state_bytes_per_parameter


@pytest.mark.usefixtures("tiny")
def test_runs_are_repeatable_and_leave_the_global_generator_alone(tmp_path, console):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run = partial(run_demo, steps=4, out=tmp_path / "a.png", device="cpu", console=console)
    first, second = run(variants=("torch", "torch"))
    assert first.losses == second.losses
    assert first.validation_loss == second.validation_loss
    (other,) = run(variants=("torch",), seed=1)
    assert other.losses != first.losses
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("tiny")
def test_training_lowers_the_loss(tmp_path, console):
    (result,) = run_demo(steps=30, out=tmp_path / "a.png", variants=("torch",), console=console)
    assert result.losses[-1] < result.losses[0] - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"variants": ("torch", "4bit")}, "unknown variant '4bit': choose from torch, 32bit, 8bit"),
        ({"variants": ()}, "no variants"),
        ({"device": "abacus"}, "cannot use device 'abacus'"),
        ({"out": "missing/loss.png"}, "no folder"),
        ({"out": "folder.png"}, "is a folder"),
        ({"out": "loss.doc"}, "ending must be one of"),
        ({"out": "loss"}, "ending must be one of"),
    ],
)
def test_bad_arguments_are_refused_before_training(tmp_path, monkeypatch, console, arguments, message):
    def too_late(*_: object) -> None:
        pytest.fail("the work had begun")

    monkeypatch.setattr("adamw_triton.demo.run.make_task", too_late)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DemoError, match=message):
        run_demo(**arguments, console=console)


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch, console):
    # Asked of os.access and not of a real folder: root may write anywhere.
    monkeypatch.setattr("adamw_triton.demo.report.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(DemoError, match="permission denied"):
        run_demo(out=tmp_path / "loss.png", console=console)


def test_storage_shared_by_several_parameters_counts_once():
    shared = torch.zeros(100)
    first, second = torch.nn.Parameter(torch.zeros(60)), torch.nn.Parameter(torch.zeros(30))
    optimizer = torch.optim.SGD([first, second])
    optimizer.state[first] = {"step": torch.tensor(1.0), "m": shared[:60]}
    optimizer.state[second] = {"step": torch.tensor(1.0), "m": shared[60:90], "scale": torch.zeros(3)}
    assert training.state_bytes(optimizer) == 4 * 100 + 4 * 3


def test_learning_rate_warms_up_and_then_falls_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = training.warmup_then_cosine(optimizer, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001


def test_running_mean_reaches_back_twenty_steps():
    means = training.running_mean([float(step) for step in range(30)])
    assert means[:3] == [0, 0.5, 1]
    assert means[29] == statistics.fmean(range(10, 30))


def test_in_a_pipe_a_line_comes_now_and_then(monkeypatch, console):
    clock = iter(range(0, 1000, 4))  # a step takes four seconds
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    with report.progress_bars(console) as progress:
        bar = progress.add_task("one", total=8, loss="")
        for step in range(8):
            report.show_loss(progress, bar, 3 - step / 10)
            if step == 0:
                assert console.file.getvalue().split() == ["one", "1", "of", "8", "steps,", "loss", "3.000"]
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1", "4", "7", "8"]
    assert lines[-1].endswith("8 of 8 steps, loss 2.300")


def test_in_a_terminal_bars_are_drawn_and_no_lines(monkeypatch):
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with report.progress_bars(console) as progress:
        bar = progress.add_task("one", total=2, loss="")
        report.show_loss(progress, bar, 3.0)
        report.show_loss(progress, bar, 2.0)
    assert "2/2" in console.file.getvalue()
    assert "steps, loss" not in console.file.getvalue()
