"""One command for a GPU machine: the goals judge what the suites wrote, and no part stops the others."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import children, goals, prove, wheels
from bench.optimizers import EXACT, OPTIMIZERS, RESIDENT
from bench.suites import first, gputests, host, limit, memory, paged, sanitize, step, telemetry, tokens
from bench.timing import Spread

# --- Figures of a GPU that there is not, in the shape in which the suites write theirs --------------------

GPU = {"gpu": "NVIDIA Imaginary"}
COPY = 3e12


def spread(seconds: float) -> Spread:
    return Spread.of([seconds] * 3)


def good_step() -> dict[str, Any]:
    """At the copy's bandwidth; every peer takes ten times as long."""
    cases = {}
    for case in step.cases("cuda", quick=False):
        elements = 1_000_000
        times = {one.key: 28 * elements / COPY * (1 if one.ours else 10) for one in (*RESIDENT, *EXACT)}
        measured = {
            key: step.Measured.of(spread(t), 1.0, 28 * elements, elements) for key, t in times.items()
        }
        result = step.Result(case, measured, {}, COPY)
        cases[result.label] = step.record(result)
    return {"cases": cases}


def good_tokens() -> dict[str, Any]:
    models = {}
    for task in tokens.tasks("cuda", quick=False):
        alone = {count: spread(1.0) for count in task.tokens}
        keys = [*task.optimizers, *(one.key for one in tokens.RELEASED)]
        measured = {key: {count: spread(1.1) for count in task.tokens} for key in keys}
        models[task.name] = tokens.Result(task, alone, measured, {}).record()
    return {"models": models}


def good_limit() -> dict[str, Any]:
    return {"models": {name: {"off_plan": 0.01, "parameters": 8_030_261_248} for name in limit.tasks(False)}}


def good_tests(tmp_path: Path) -> dict[str, Any]:
    tests = [gputests.Test(file, "test", "passed", 1.0, "") for file in goals.TESTED.values()]
    return gputests.record(tests, {"beside": 0, "alone": 0})


@pytest.fixture
def good(tmp_path: Path) -> dict[str, Any]:
    link = paged.Link(50e9, 50e9, 40e9)
    moved = paged.Measured(spread(1.0), int(39e9))
    placed = memory.Bytes(1000, 0), memory.Bytes(1001, 0)
    clean = {
        tool: "ERROR SUMMARY: 0 errors RACECHECK SUMMARY: 0 hazards displayed 9 passed"
        for tool in sanitize.TOOLS
    }
    texts = {**clean, sanitize.PLANTED: "ERROR SUMMARY: 1 error"}
    found = {
        "gputests": good_tests(tmp_path),
        "sanitize": {"tools": sanitize.outcomes(texts, dict.fromkeys(sanitize.TOOLS, 0))},
        "step": good_step(),
        "paged": {"optimizers": {one.key: paged.record(moved, link) for one in paged.rows("cuda")}},
        "tokens": good_tokens(),
        "limit": good_limit(),
        "memory": {"optimizers": memory.record({one.key: placed for one in OPTIMIZERS if one.ours})},
        "host": {"seconds": {"300": host.record({name: [1e-4] for name in host.builders("cuda")})}},
        "telemetry": telemetry.record(
            {v: {"plain": Spread.of([1.0]), "telemetry": Spread.of([1.2])} for v in telemetry.VARIANTS},
            {"backward": 9.0, "plain": 1.0, "telemetry": 1.5},
        ),
        "first": first.record({key: {how: {"first": 0.2} for how in first.HOW} for key in first.VARIANTS}),
    }
    return {name: json.loads(json.dumps({"run": GPU, **data})) for name, data in found.items()}


def verdicts(results: Mapping[str, Any]) -> dict[str, str]:
    return {one.goal.what: one.verdict for one in goals.judge(results, {})}


# --- The goals -------------------------------------------------------------------------------------------


def test_every_goal_finds_its_figure_where_the_suites_write_it(good: dict[str, Any]) -> None:
    found = verdicts(good)
    assert set(found.values()) == {"met", "told"}, found
    assert len(found) == len(goals.GOALS) > 35


def slower(case: str, key: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def change(results: dict[str, Any]) -> None:
        got = results["step"]["cases"][case]["optimizers"][key]
        got["median"] *= factor
        got["share_of_copy"] /= factor

    return change


def put(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(results: dict[str, Any]) -> None:
        for key in path[:-1]:
            results = results[key]
        assert path[-1] in results
        results[path[-1]] = value

    return change


OURS = "adamw_triton 32bit"
WORSE = {
    "a slower kernel": (
        slower("1.1e9, bf16", OURS, 1.06), ["32-bit, bf16: of the copy's bandwidth"]),
    "a peer as fast as ours": (
        slower("1.1e9, fp32", "flashoptim 8-bit", 0.11), ["8-bit, fp32: flashoptim 8-bit takes"]),
    "adapters": (
        slower("LoRA, 300 tensors, bf16", "torch fused", 0.09), ["300 LoRA tensors: torch fused takes"]),
    "the host": (
        put(151e-6, "host", "seconds", "300", "adamw_triton", "median"),
        ["300 LoRA tensors: host's time of a step"]),
    "paging": (
        lambda results: [put(0.89, "paged", "optimizers", f"adamw_triton paged_8bit, {way}", "share_of_link")
                         (results) for way in ("copy", "zero_copy")],
        ["paged 8-bit: of the link, both ways at once"]),
    "bytes": (
        put(1015, "memory", "optimizers", "adamw_triton paged_32bit", "measured", "gpu"),
        ["paged_32bit: GPU bytes off what was predicted"]),
    "exact weights": (
        slower("1.1e9, bf16", f"{OURS}, exact", 1.11),
        ["exact weights, 32-bit, bf16: takes of the same without"]),
    "a plan": (
        put(0.021, "limit", "models", "Llama-3.2-3B", "off_plan"),
        ["3B, fine-tuned with release: peak off its plan"]),
    "compiling": (put(3.1, "first", "variants", "8bit", "cold"), ["first step, cold"]),
    "statistics": (put(0.02, "telemetry", "training", "share"), [
        "telemetry=10: of a training step of a small Llama"]),
    "a race": (put(2, "sanitize", "tools", "racecheck", "found"), ["racecheck: found"]),
    "a failing test": (
        put({"passed": 3, "failed": 1, "skipped": 0}, "gputests", "files", "tests/paging/test_on_gpu.py"),
        ["that fail: paged against resident bit for bit"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WORSE)
def test_a_worse_figure_misses_its_goal_and_no_other(name: str, good: dict[str, Any]) -> None:
    change, expected = WORSE[name]
    worse = copy.deepcopy(good)
    change(worse)
    before, after = verdicts(good), verdicts(worse)
    assert [what for what in after if after[what] != before[what]] == expected
    assert {after[what] for what in expected} == {"missed"}


def why(results: Mapping[str, Any], what: str, ended: dict[str, str] | None = None) -> tuple[str, str]:
    found = {one.goal.what: one for one in goals.judge(results, ended or {})}[what]
    return found.verdict, found.why


def test_what_was_not_measured_says_why(good: dict[str, Any]) -> None:
    peer = "8-bit, bf16: torchao 8-bit takes"
    case = good["step"]["cases"]["1.1e9, bf16"]
    del case["optimizers"]["torchao 8-bit"]
    assert why(good, peer) == ("not measured", "step has no torchao 8-bit")
    case["cannot_run"]["torchao 8-bit"] = "ImportError: none"
    assert why(good, peer) == ("not measured", "torchao 8-bit: ImportError: none")
    good["step"]["run"]["gpu"] = None
    assert why(good, peer) == ("not measured", "no GPU")
    del good["step"]
    assert why(good, peer) == ("not measured", "step left no results")
    ended = {"step": "stopped at the end of its share"}
    assert why(good, peer, ended) == (
        "not measured",
        "step left no results (step: stopped at the end of its share)",
    )


def test_a_figure_that_is_not_a_number_meets_nothing(good: dict[str, Any]) -> None:
    put(float("nan"), "first", "variants", "8bit", "cold")(good)
    assert verdicts(good)["first step, cold"] == "missed"
    put(None, "first", "variants", "8bit", "cold")(good)
    assert verdicts(good)["first step, cold"] == "not measured"


def test_tests_that_did_not_run_are_no_success(good: dict[str, Any]) -> None:
    everything = "GPU tests that fail"
    found = gputests.record([], {"beside": 0, "alone": 0})
    assert why({"gputests": {"run": GPU, **found}}, everything)[0] == "not measured"
    passed = gputests.Test("tests/test_a.py", "test", "passed", 1.0, "")
    failed = gputests.Test("tests/test_a.py", "test", "failed", 1.0, "E")
    for tests, ended, expected in (
        ([passed], {"beside": 0, "alone": gputests.NO_TESTS}, "met"),
        ([passed], {"beside": 0, "alone": None}, "not measured"),
        ([passed], {"beside": 0, "alone": 4}, "not measured"),
        ([passed, failed], {"beside": 1, "alone": None}, "missed"),
    ):
        found = gputests.record(tests, ended)
        assert why({"gputests": {"run": GPU, **found}}, everything)[0] == expected


def test_the_exit_status_tells_what_became_of_the_goals(good: dict[str, Any], tmp_path: Path) -> None:
    def code() -> int:
        for name in [*tmp_path.glob("*.json")]:
            name.unlink()
        for name, data in good.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(data))
        return goals.finish(tmp_path, {}, "")

    assert code() == 0
    del good["paged"]
    assert code() == 2
    (tmp_path / "paged.json").write_text('{"run": ')  # stopped while it wrote
    assert goals.finish(tmp_path, {}, "") == 2
    good["first"]["variants"]["8bit"]["cold"] = 9.0
    assert code() == 1
    page = (tmp_path / "goals.md").read_text()
    assert "| first step, cold | at most 3 s | 9 s | **missed** |" in page
    assert "not measured: paged left no results" in page


# --- Parts that end as they like ----------------------------------------------------------------------------

BAD_CHILD = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_a_process_that_hangs_is_stopped_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(children, "GRACE", 0.3)
    began = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        code = children.run([sys.executable, "-c", BAD_CHILD], 3, children.environment(), log)
    assert code is None
    assert time.monotonic() - began < 20
    grandchild = int((tmp_path / "log").read_text())
    while alive(grandchild) and time.monotonic() - began < 20:  # it was sent the signal, and dies in its time
        time.sleep(0.1)
    assert not alive(grandchild)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_process_that_is_asked_in_time_leaves_what_it_has(tmp_path: Path, ignored: bool) -> None:
    """Also where we have been started by a shell's `&`."""
    left = f"open({str(tmp_path / 'x')!r}, 'w').close()"
    code = f"import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: {left}"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGINT)
    try:
        assert children.run([sys.executable, "-c", code], 6, children.environment()) is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "x").exists()


PARTS = {
    "step": "import time; time.sleep(60)",
    "paged": "raise SystemExit(3)",
    "train": "import os; os.abort()",
    "first": "import json, sys; json.dump({'run': {'gpu': 'G'}}, open(sys.argv[1] + '/first.json', 'w'))",
}


@pytest.mark.slow
def test_a_part_that_hangs_or_breaks_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(children, "GRACE", 1.0)
    monkeypatch.setattr(prove, "CLOSING", 0.0)
    parts = [prove.Part("step", 4), *(prove.Part(name, 12) for name in ("paged", "train", "first"))]
    monkeypatch.setattr(prove, "PARTS", parts)
    monkeypatch.setattr(
        prove, "command", lambda part, folder, *_: [sys.executable, "-c", PARTS[part.suite], str(folder)]
    )
    began = time.monotonic()
    ended, took = prove.run_all(parts, tmp_path, [], began, 40, quick=True)
    assert ended == {
        "step": "stopped at the end of its share",
        "paged": "failed",
        "train": "failed with -6",
        "first": "done",
    }
    assert took["step"] < 8
    assert goals.load(tmp_path) == {"first": {"run": {"gpu": "G"}}}
    ended, _ = prove.run_all(parts, tmp_path, [], began - 100, 40, quick=True)
    assert set(ended.values()) == {"left out: no time"}


def test_the_shares_are_what_there_is() -> None:
    assert sum(part.share for part in prove.PARTS) <= 60 * 9.5 - prove.CLOSING
    suites = [part.suite for part in prove.PARTS]
    assert suites[:7] == ["gputests", "sanitize", "limit", "step", "tokens", "paged", "host"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="in full, there")
def test_the_command_runs_through_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    (results / "host.json").write_text(json.dumps({"run": GPU}))  # another day's
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(prove, "FOLDER", tmp_path / "no wheels")
    assert prove.main(["--quick", "--parts", "sanitize", "host", "--out", str(results)]) == 2
    judged = json.loads((results / "goals.json").read_text())
    assert len(judged["goals"]) == len(goals.GOALS)
    assert {goal["verdict"] for goal in judged["goals"]} == {"not measured"}
    assert {goal["why"] for goal in judged["goals"]} >= {"no GPU", "step left no results"}
    assert judged["ended"] == {"sanitize": "cannot run", "host": "done"}
    assert 0 < len(list(out.iterdir())) <= 8
    with tarfile.open(out / "results.tar.gz") as packed:
        assert {"results/goals.md", "results/host.json"} <= set(packed.getnames())


# --- Its parts ----------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}_peer.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_wheels_are_installed_for_our_processes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched = tmp_path / ".whl"
    fetched.mkdir()
    for name in ("torch_optimi", "torch", "triton"):
        wheel(fetched, name, "99.0")
    site = tmp_path / "site"
    assert prove.install(fetched, site) == [site]
    assert {path.name for path in site.glob("*_peer.py")} == {"torch_optimi_peer.py"}
    assert "torch-optimi" in capsys.readouterr().out.splitlines()[0]
    assert prove.install(tmp_path / "none", tmp_path / "elsewhere") == []


def test_what_the_wheels_need_is_told(tmp_path: Path) -> None:
    wheel(
        tmp_path, "a", "1", "Requires-Dist: torch>=2\nRequires-Dist: B_b\nRequires-Dist: c; extra == 'more'\n"
    )
    wheel(tmp_path, "b_b", "1", "Requires-Dist: absent>2\nRequires-Dist: old; python_version < '3'\n")
    assert wheels.unmet(sorted(tmp_path.glob("*.whl"))) == {("b-b", "absent>2")}


SOME_TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "no"
def test_skipped(): pytest.skip("not here")
"""


def test_a_report_of_pytest_is_read(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(SOME_TESTS)
    xml = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", "tests"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    found = gputests.record(list(gputests.read(xml)), {"beside": 1, "alone": 5})
    assert found["total"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert list(found["files"]) == ["tests/test_some.py"]
    assert "no" in found["failures"]["tests/test_some.py::test_bad"]
    assert not found["stopped"] + found["broken"]


def test_every_file_whose_goal_is_told_has_tests_for_a_gpu() -> None:
    files = set(gputests.files())
    assert files >= set(goals.TESTED.values()) - {"tests/optimizer/test_capturable.py"}
    assert files >= {"tests/kernels/test_index.py", "tests/kernels/test_huge.py"}


def test_a_planted_error_that_goes_unnoticed_is_no_success() -> None:
    clean = "ERROR SUMMARY: 0 errors\nRACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n9 passed"
    codes: dict[str, int | None] = dict.fromkeys((*sanitize.TOOLS, sanitize.PLANTED), 0)
    texts = {**dict.fromkeys(sanitize.TOOLS, clean), sanitize.PLANTED: "ERROR SUMMARY: 128 errors"}
    assert {tool: got["found"] for tool, got in sanitize.outcomes(texts, codes).items()} == {
        "memcheck": 0,
        "racecheck": 0,
    }
    for said in ("ERROR SUMMARY: 0 errors", "no such option"):
        unseen = sanitize.outcomes({**texts, sanitize.PLANTED: said}, codes)
        assert {got["found"] for got in unseen.values()} == {None}
    texts["racecheck"] = "RACECHECK SUMMARY: 0 hazards displayed\nno tests ran"
    assert sanitize.outcomes(texts, codes)["racecheck"]["found"] is None
