"""What people ask first, answered by the real selector through the command line.

Expected from sizes alone: weights, gradients, 8 or 2.03 bytes of state for each parameter that is trained,
and 2 more of a bf16 one, 4 of an fp16 one.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from adamw_triton.cli import main

CONFIGS = Path(__file__).parents[1] / "models" / "configs"


def answer(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON, on a host with 32 GiB to spare."""
    code = main(["plan", *shlex.split(line), "--host-memory", "32GiB", "--json"])
    return code, json.loads(capsys.readouterr().out)


QUESTIONS: dict[str, tuple[str, str | None, str]] = {
    "3B, all of it, on a T4": (
        "Llama-3.2-3B --gpu T4",
        "8bit, partly paged",
        "6.0 + 6.0 + 1.5 GiB of 14.6 leave 0.3: neither 23.9 nor 6.1 GiB of state fit, pages do",
    ),
    "3B, exactly, on a T4": (
        "Llama-3.2-3B --gpu T4 --prefer exact",
        "32bit, partly paged",
        "23.9 GiB of state fit the host's 32",
    ),
    "3B on a T4 with gradients accumulated": (
        "Llama-3.2-3B --gpu T4 --accumulation 4",
        None,
        "the logits of 128,256 words have to fit beside all gradients: 1.8 GiB more",
    ),
    "7B, all of it, on 24 GB": (
        "Llama-2-7B --gpu 24GiB",
        None,
        "12.6 + 12.6 GiB of weights and gradients are more than 24, wherever the state is",
    ),
    "7B with LoRA on 24 GB": ("Llama-2-7B --gpu 'RTX 3090' --lora 16", "32bit", "128 MiB of state"),
    "7B with QLoRA on 16 GB": (
        "Llama-2-7B --gpu T4 --lora 16 --quantized-base 4 --dtype fp16",
        "32bit",
        "3.9 GiB of weights",
    ),
    "70B with LoRA on 80 GB": ("Llama-3.1-70B --gpu A100-80GB --lora 16", None, "131.7 GiB of weights"),
    "70B with QLoRA on 80 GB": (
        "Llama-3.1-70B --gpu A100-80GB --lora 16 --quantized-base 4",
        "32bit",
        "40.0 GiB of weights, 6 of activations, 0.5 of state",
    ),
    "7B, all of it, on 80 GB": (
        "Llama-2-7B --gpu A100-80GB",
        "8bit",
        "12.6 + 12.6 + 50.2 + 12.6 GiB of exact weights are more than 79.2, with 12.7 GiB of state they fit",
    ),
    "7B, all of it, on 48 GB": (
        "Llama-2-7B --gpu L40S",
        "8bit, partly paged",
        "12.6 + 12.6 + 12.7 + 12.6 GiB of 44.4",
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_textbook_questions(question: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, expected, reason = QUESTIONS[question]
    code, found = answer(f"{CONFIGS}/{line}", capsys)
    assert found["plan"]["chosen"] == expected, reason
    assert code == (0 if expected else 1)


def test_the_bytes_of_the_first_question(capsys: pytest.CaptureFixture[str]) -> None:
    """8 bytes a parameter in 32 bits; 2 and 4/128 in 8, but for small norms, which stay in 32."""
    _, found = answer(f"{CONFIGS}/Llama-3.2-3B --gpu T4", capsys)
    candidates = {candidate["name"]: candidate for candidate in found["plan"]["candidates"]}
    parameters = 3_212_749_824
    norms = 57 * 3072
    assert candidates["32bit"]["gpu_bytes"] == 8 * parameters
    assert candidates["8bit"]["gpu_bytes"] == (2 + 4 / 128) * (parameters - norms) + 8 * norms
    assert candidates["8bit, paged"]["host_bytes"] == candidates["8bit"]["gpu_bytes"]
    assert found["parameters"] == found["trained"] == parameters
