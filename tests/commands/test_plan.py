"""`adamw-triton plan`: what it asks the selector, what it prints, what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import adamw_triton
from adamw_triton.cli import main
from adamw_triton.commands.plan import parse_count
from adamw_triton.models import ModelFileError
from tests.models.files import write, write_model
from tests.models.test_headers import HOSTILE, bytes_read
from tests.models.test_model import shapes_of

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
GIB = 1 << 30


class Asked:
    """In place of `adamw_triton.plan`: what it was asked, and an answer."""

    chosen: object | None = "8bit"
    limits: ClassVar[Any] = [SimpleNamespace(room=0)]

    def __call__(self, named: Any, gpu_memory: Any = None, host_memory: Any = None, **more: Any) -> Asked:
        self.names, self.params = zip(*named, strict=True)
        self.gpu, self.host, self.more = gpu_memory, host_memory, more
        return self

    @property
    def candidates(self) -> list[Any]:
        """Guesses are told apart by what they leave."""
        return [SimpleNamespace(gpu_bytes=self.more["activations"] or 0)]

    @property
    def trained(self) -> int:
        return sum(param.numel() for param in self.params if param.requires_grad)

    @property
    def frozen_bytes(self) -> int:
        return sum(param.nbytes for param in self.params if not param.requires_grad)

    def __str__(self) -> str:
        return "THE PLAN"

    def to_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    double = Asked()
    monkeypatch.setattr(adamw_triton, "plan", double, raising=False)
    return double


def run(line: str) -> int:
    return main(["plan", *shlex.split(line)])


def test_a_folder_on_a_card(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{CONFIGS}/Llama-3.2-3B --gpu T4") == 0
    assert asked.trained == 3_212_749_824
    assert (asked.gpu, asked.host, asked.more["prefer"]) == ("T4", None, "speed")
    assert {param.dtype for param in asked.params} == {torch.bfloat16}
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    lines = output.replace("\n  ", " ").splitlines()
    assert lines[0] == "Llama-3.2-3B: 3,212,749,824 parameters in bfloat16, all trained"
    assert lines[1].startswith("counted: ")
    assert lines[2].startswith("activations: about ")
    assert lines[2].endswith(
        " estimated for 1 x 2048 tokens with gradient checkpointing; counted are the inputs of 28 layers, "
        "one layer made anew, and logits of 128,256 words, less the room of the gradients, which come later"
    )
    assert lines[3:] == ["THE PLAN"]


def test_all_options_reach_the_selector(asked: Asked) -> None:
    line = "--gpu 24GiB --host-memory 32GiB --dtype fp32 --activations 3GiB --prefer exact --release"
    assert run(f"{CONFIGS}/Llama-2-7B {line}") == 0
    assert (asked.gpu, asked.host) == (24 * GIB, 32 * GIB)
    assert asked.more == {
        "activations": 3 * GIB, "prefer": "exact", "gradient_release": True,
        "accumulation": 1, "accumulate_on": "gpu", "accumulate_dtype": None,
        "tokens": 2048, "checkpointing": True, "ranks": 1, "sharding": "full",
    }  # fmt: skip
    more = (
        "--accumulation 4 --accumulate-on host --accumulate-dtype fp32 --batch 3 --seq 100 --no-checkpointing"
    )
    assert run(f"{CONFIGS}/Llama-2-7B {line} {more}") == 0
    assert (asked.more["accumulation"], asked.more["accumulate_on"]) == (4, "host")
    assert asked.more["accumulate_dtype"] is torch.float32
    assert (asked.more["tokens"], asked.more["checkpointing"]) == (300, False)
    assert {param.dtype for param in asked.params} == {torch.float32}
    assert run(f"{CONFIGS}/Llama-2-7B --gpu T4 --ranks 4 --sharding none") == 0
    assert (asked.more["ranks"], asked.more["sharding"]) == (4, "none")
    assert "model.layers.0.self_attn.q_proj.weight" in asked.names


def test_where_tokens_do_not_meet_all_weights_backward_is_not_timed(asked: Asked, tmp_path: Path) -> None:
    experts = {
        "model_type": "mixtral", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
        "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(experts))
    for line in (str(tmp_path), f"{CONFIGS}/Llama-2-7B --lora 16 --quantized-base 4 --dtype fp16"):
        assert run(f"{line} --gpu H200") == 0
        assert asked.more["tokens"] is None


def test_lora_on_a_quantized_base(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{CONFIGS}/Llama-2-7B --gpu T4 --lora 16 --quantized-base 4 --dtype fp16") == 0
    assert asked.trained == 16 * 32 * 4 * 8192
    assert asked.frozen_bytes == 6_476_005_376 * 9 // 16 + 2 * (6_738_415_616 - 6_476_005_376)
    assert (
        "6,738,415,616 frozen parameters in float16, projections in 4 bits; 16,777,216 trained in float32, "
        "LoRA of rank 16 on attention"
    ) in " ".join(capsys.readouterr().out.split())


def test_activations_follow_the_batch(asked: Asked) -> None:
    """More of anything takes more; the estimate is in the order of what such runs are known to take."""
    taken = []
    for options in ("", "--seq 4096", "--seq 4096 --batch 2", "--seq 4096 --batch 2 --no-checkpointing"):
        assert run(f"{CONFIGS}/Llama-2-7B --gpu T4 {options}") == 0
        taken.append(asked.more["activations"])
    assert taken == sorted(taken)
    assert taken[3] > 5 * taken[2]
    assert 0.1 * GIB < taken[0] < 1 * GIB
    assert run(f"{CONFIGS}/Llama-2-7B --gpu T4 --accumulation 4") == 0
    assert taken[0] + GIB < asked.more["activations"] < 3 * GIB, "the logits find no gradients' room"
    assert run(f"{CONFIGS}/Llama-2-7B --gpu T4 --lora 16 --lora-targets all-linear") == 0
    adapted = asked.more["activations"]
    assert run(f"{CONFIGS}/Llama-2-7B --gpu T4 --lora 16 --lora-targets all-linear --quantized-base 4") == 0
    assert asked.more["activations"] == adapted + 2 * 4096 * 11008


def test_a_file_of_weights_alone_says_nothing_of_activations(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path / "adapter.safetensors", {"a": (4, 4)})
    assert run(f"{path} --gpu T4") == 0
    assert asked.more["activations"] is None
    assert "activations: not counted: nothing tells the model's dimensions; give" in capsys.readouterr().out


def test_a_number_of_parameters_is_enough(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--params 7e9 --gpu T4") == 0
    assert asked.trained == 7_000_000_000
    assert capsys.readouterr().out.startswith("7e+09 parameters: 7,000,000,000 parameters in bfloat16")
    assert run("--params 7B --gpu T4 --lora 8 --quantized-base 4 --dtype fp16") == 0
    assert 5e6 < asked.trained < 2e7
    assert run("--params 1000 --gpu T4") == 0
    assert asked.trained == 1000


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("7e9", 7 * 10**9),
        ("7B", 7 * 10**9),
        ("1.5b", 15 * 10**8),
        ("350M", 35 * 10**7),
        ("1000", 1000),
        ("1.001k", 1001),
        ("1.1B", 1_100_000_000),
        (" 2E+3 ", 2000),
    ],
)
def test_numbers_of_parameters(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "-7e9",
        "0",
        "nan",
        "inf",
        "1e99",
        "7e9e9",
        "seven",
        "7 G",
        "1e400",
        "1000.5",
        "1.0005k",
        "1_000",
        "0x1000",
        "٣٣٣٣",
        "1e-3B",
        "999",
    ],
)
def test_no_numbers_of_parameters(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"--params must be a number from 1,000 to 1e\+13, and whole, like 7e9"
    ):
        parse_count(text)


@pytest.mark.parametrize("text", ["1.5", "0.5", "7", "405"])
def test_billions_without_their_unit_are_not_taken_for_parameters(text: str) -> None:
    with pytest.raises(ValueError, match=f"not '{text}'; did you mean '{text}B'"):
        parse_count(text)
    assert parse_count(f"{text}B") == float(text) * 1e9


def test_json_is_all_there_is_on_the_output(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{CONFIGS}/Llama-2-7B --gpu T4 --lora 4 --json --activations 1GiB") == 0
    found = json.loads(capsys.readouterr().out)
    assert "llama" in found.pop("counted").lower()
    assert found == {
        "model": "Llama-2-7B",
        "parameters": 6_738_415_616,
        "trained": 4 * 32 * 4 * 8192,
        "activations": GIB,
        "activations_from": "1.0 GiB, as given",
        "plan": {"chosen": "8bit"},
        "would_fit": [],
    }


def test_the_exit_code_tells_whether_anything_fits(asked: Asked) -> None:
    asked.chosen = None
    assert run("--params 7e9 --gpu T4") == 1


def test_without_rich_the_plan_is_text(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run("--params 7e9 --gpu T4") == 0
    assert capsys.readouterr().out.endswith("\nTHE PLAN\n")


REFUSED = {
    "": "name a model's folder or file, or its size as --params; one of them",
    "x --params 7e9": "one of them",
    "--params=-7e9": "--params must be a number from 1",
    "--params lots": "--params must be a number from 1",
    "/no/such/folder": "there is no file or folder '/no/such/folder'",
    "meta-llama/Llama-3.2-3B": "a model of the Hugging Face Hub must be downloaded first",
    "--params 7e9 --gpu T5": "--gpu: unknown GPU 'T5': did you mean 'T4'?; or give its memory, like '24GiB'",
    "--params 7e9 --gpu A100": "'A100' is several GPUs: say 'A100-40GB' or 'A100-80GB'",
    "--params 7e9 --gpu=-24GiB": "Invalid --gpu: '-24GiB'; it must be",
    "--params 7e9 --gpu 24": "Invalid --gpu: '24' has no unit and means bytes: write it like '24GiB'",
    "--params 7e9 --gpu 0GiB": "Invalid --gpu: '0GiB' means 0 B, and no GPU has so little",
    "--params 7e9 --gpu T4 --host-memory 64": "Invalid --host-memory: '64' has no unit and means bytes",
    "--params 7e9 --gpu ''": "unknown GPU ''",
    "--params 7e9 --gpu T4 --host-memory=-1GiB": "Invalid --host-memory: '-1GiB'",
    "--params 7e9 --gpu T4 --host-memory much": "Invalid --host-memory: 'much'; it must be a number of bytes",
    "--params 7e9 --gpu T4 --activations 1e9GiB": "Invalid --activations: '1e9GiB'",
    "--params 7e9 --gpu T4 --lora 0": "--lora must be 1 to 65,536, not 0",
    "--params 7e9 --gpu T4 --lora=-8": "--lora must be 1 to 65,536, not -8",
    "--params 7e9 --gpu T4 --accumulation 0": "--accumulation must be 1 to",
    "--params 7e9 --gpu T4 --accumulate-on disk": "--accumulate-on must be gpu or host, not 'disk'",
    "--params 7e9 --gpu T4 --accumulate-on host": "--accumulate-on host needs --release",
    "--params 7e9 --gpu T4 --accumulate-dtype fp32": "--accumulate-dtype needs --accumulate-on host",
    "--params 7e9 --gpu T4 --accumulate-dtype fp8": "--accumulate-dtype must be fp32, not 'fp8'",
    "--params 7e9 --gpu T4 --ranks 0": "--ranks must be 1 to",
    "--params 7e9 --gpu T4 --ranks 2 --sharding half": "--sharding must be full or none, not 'half'",
    "--params 7e9 --gpu T4 --ranks 2 --release": "--release is for one GPU, not for --ranks 2",
    "--params 7e9 --gpu T4 --batch 0": "--batch must be 1 to",
    "--params 7e9 --gpu T4 --seq 99999999999": "--seq must be 1 to 16,777,216, not 99999999999",
    "--params 7e9 --gpu T4 --dtype fp8": "--dtype must be fp32 or bf16 or fp16, not 'fp8'",
    "--params 7e9 --gpu T4 --prefer cheap": "--prefer must be speed or exact, not 'cheap'",
    "--params 7e9 --gpu T4 --lora-targets q": "--lora-targets must be attention or all-linear, not 'q'",
    "--params 7e9 --gpu T4 --quantized-base 4": "--quantized-base needs --lora RANK",
    "--params 7e9 --gpu T4 --lora 8 --quantized-base 3": "--quantized-base must be 4, not 3",
    "--params 1e6 --gpu T4 --lora 8": "--lora needs the shapes of a model of 1,000,000 parameters",
}


def refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("adamw-triton plan: ")
    assert message in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("line", REFUSED)
def test_bad_arguments_exit_with_2_and_one_line(
    line: str, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(line, REFUSED[line], capsys)
    assert not hasattr(asked, "params")


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_exit_with_2_and_one_line(
    case: str, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, data_bytes, message = HOSTILE[case]
    write(tmp_path / "model.safetensors", header, data_bytes)
    refused(f"{tmp_path} --gpu T4", message, capsys)


def test_other_bad_files_exit_with_2_and_one_line(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(f"{tmp_path} --gpu T4", "has neither safetensors files nor a config.json", capsys)
    (tmp_path / "config.json").write_text("<html>404</html>")
    refused(f"{tmp_path} --gpu T4", "config.json is not valid JSON", capsys)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": -5}')
    refused(f"{tmp_path} --gpu T4", "config.json says hidden_size=-5: it must be a whole number", capsys)
    write_model(tmp_path / "new\nline.safetensors", {"a": (2, 2)})
    (tmp_path / "config.json").unlink()
    refused(f"{tmp_path} --gpu T4 --lora 8", "no projections that --lora-targets attention means", capsys)
    os.mkfifo(tmp_path / "pipe")
    refused(f"{tmp_path}/pipe --gpu T4", "is not a regular file", capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_must_be_named(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    refused("--params 7e9", "there is no GPU here: say which with --gpu, like T4 or 24GiB", capsys)


def test_what_the_selector_refuses_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise ModelFileError("it cannot\nbe planned")

    monkeypatch.setattr(adamw_triton, "plan", refusing, raising=False)
    refused("--params 7e9 --gpu T4", "it cannot be planned", capsys)


def test_a_file_of_141_gb_is_planned_in_under_a_second(asked: Asked, tmp_path: Path) -> None:
    """All of the command's own work; torch, which takes a second or two to import, is there already."""
    path = write_model(tmp_path / "model.safetensors", shapes_of("Llama-3.1-70B"))
    bytes_before, start = bytes_read(), time.perf_counter()
    assert run(f"{path} --gpu A100-80GB --lora 16") == 0
    seconds, count = time.perf_counter() - start, bytes_read() - bytes_before
    assert asked.frozen_bytes == 2 * 70_553_706_496
    assert seconds < 1
    assert count < 10_000_000


def test_release_lets_7b_be_trained_on_24_gb(capsys: pytest.CaptureFixture[str]) -> None:
    """All weights, exactly; gradients that are accumulated are all there, and too many again."""
    line = f"{CONFIGS}/Mistral-7B-v0.3 --gpu 4090 --host-memory 32GiB"
    assert run(line) == 1
    assert " gradients at one time" not in capsys.readouterr().out
    assert run(f"{line} --release") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "384.0 MiB gradients at one time" in said
    assert "16-bit weights are kept exactly" in said
    assert run(f"{line} --release --accumulation 8") == 1
    assert "gradients: accumulated, and so all there until the last backward" in capsys.readouterr().out
    line = f"{CONFIGS}/Mistral-7B-v0.3 --gpu 4090 --host-memory 48GiB --release --accumulation 8"
    assert run(f"{line} --accumulate-on host") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "384.0 MiB gradients at one time" in said
    assert "16-bit weights are kept exactly" in said
    assert "Gradients of 8 micro-batches add up in host memory: 13.5 GiB" in said
    assert re.search(r"8 x 2,048 tokens take about .* pass beside backward, .* come on top: \d", said)
    assert "all there" not in said


def test_what_the_guide_says_of_llama_3_1_8b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        **shape,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(f"{tmp_path} --gpu 4090 --host-memory 32GiB --release --json") == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    chosen = next(each for each in plan["candidates"] if each["name"] == plan["chosen"])
    told = [plan["devices"][0]["spent"][name] for name in ("weights", "gradients at one time", "activations")]
    told += [chosen["gpu_bytes"], chosen["host_bytes"]]
    weights, gradients, activations, state, host = [f"{count / GIB:.1f} GiB" for count in told]
    said = f"{weights} of weights, {gradients} of gradients, {activations} of activations, "
    said += f"{state} of state and staging; {host} of state in host"
    page = Path(__file__).parents[2] / "docs" / "guides" / "full_8b_on_24gb.md"
    page_text = " ".join(page.read_text().split())
    assert said in page_text
    line = f"{tmp_path} --gpu 4090 --release --accumulation 8 --accumulate-on host --json --host-memory "
    for memory, weights, claim in (
        ("48GiB", "exact", "beside 48 or 64 GiB they are exact ({} of it)"),
        ("64GiB", "exact", "beside 48 or 64 GiB they are exact ({} of it)"),
        ("32GiB", "stochastic", "beside 32 GiB they are not ({})"),
        ("64GiB --accumulate-dtype fp32", "exact", "beside exact weights {} in all"),
    ):
        assert run(line + memory) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        more = next(each for each in plan["candidates"] if each["name"] == plan["chosen"] and each["fits"])
        assert more["weights"] == weights
        assert claim.format(f"{more['host_bytes'] / GIB:.1f} GiB") in page_text
    shares = []
    for batches in (1, 4, 8, 16):
        assert run(f"{line} 64GiB --accumulation {batches}") == 0
        notes = json.loads(capsys.readouterr().out)["plan"]["notes"]
        shares.append(re.findall(r"come on top: ([\d.]+%)", notes[-1])[0])
    assert "{} for one micro-batch, {} for 4, {} for 8, {} for 16".format(*shares) in page_text
    assert run(line + "48GiB") == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    more = next(each for each in plan["candidates"] if each["name"] == plan["chosen"])
    assert more["weights"] == "exact"
    moving = re.search(r"(\d.*) of what is there; moving them is (\d.*) of the step", plan["notes"][0])
    assert moving is not None
    assert f"{more['host_bytes'] / GIB:.1f} GiB of host memory in all" in page_text
    assert f"{moving[1].split()[-2]} GiB of sums, which take {moving[2]} of each step to move" in page_text
