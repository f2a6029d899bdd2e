"""``python -m bench.finetuning '{...}'``: one full fine-tuning by an unmodified Trainer.

A Llama of random weights is trained on bytes with ``gradient_release``, on a GPU of which a balloon leaves no
more than a smaller one has. Prints one line of JSON: what was planned, what it took.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
PARTS = ("weights", "gradients at one time", "activations")
"""Of a plan, that training itself takes."""


def planned(config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What ``adamw-triton plan`` says of the model's config.json, before there is a model."""
    from adamw_triton.cli import main

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        line = [folder, "--gpu", given["gpu"], "--host-memory", given["host"], "--release", "--json"]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(["plan", *line, "--seq", str(given["seq"])])
    found: dict[str, Any] = json.loads(out.getvalue())["plan"]
    return found


def candidate(plan: dict[str, Any], name: str | None) -> dict[str, Any] | None:
    """The first of that name that fits: with exact weights, if there is one."""
    named = (each for each in plan["candidates"] if each["name"] == name and each["fits"])
    return next(named, None)


def balloon(leave: int) -> int:
    """Take all of the GPU's memory but so much, until the process ends; how much it is."""
    torch.cuda.empty_cache()
    _KEPT.append(torch.empty(torch.cuda.mem_get_info()[0] - leave, dtype=torch.uint8, device="cuda"))
    return _KEPT[-1].nbytes


_KEPT: list[torch.Tensor] = []


def train(given: dict[str, Any]) -> dict[str, Any]:
    """Plan, then train."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    import adamw_triton.huggingface  # noqa: F401
    from adamw_triton.demo.corpus import load_corpus
    from adamw_triton.memory.gpu import SLACK_SHARE

    on_gpu = torch.cuda.is_available()
    config = given["config"]
    plan = planned(config, given)
    spent = plan["devices"][0]["spent"]
    held = 0
    if on_gpu and given["limited"]:
        # Of slack, auto keeps a share of the whole GPU, not of the smaller card's; what is reserved tells
        # whether the card would have done.
        more = SLACK_SHARE * (torch.cuda.mem_get_info()[1] - spent["memory"])
        held = balloon(spent["memory"] - spent["driver and other processes"] + int(more))
    began = time.perf_counter()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        dtype, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(LlamaConfig(**config))
        finally:
            torch.set_default_dtype(dtype)
    built = time.perf_counter() - began
    text = load_corpus().long()
    length = given["seq"]
    rows = [text[at * length : (at + 1) * length] for at in range(given["steps"])]
    data = [{"input_ids": row, "labels": row} for row in rows]
    steps: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            steps.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, optim=given["optim"], optim_args=given["optim_args"], learning_rate=1e-5,
            lr_scheduler_type="constant", max_grad_norm=0, max_steps=len(data), logging_steps=1,
            per_device_train_batch_size=1, gradient_checkpointing=True, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=not on_gpu,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    chosen = candidate(plan, given["variant"] or plan["chosen"])
    assert chosen is not None
    own = optimizer.plan
    return {
        "parameters": sum(param.numel() for param in model.parameters()),
        "planned": {name: spent[name] for name in PARTS} | {"state": chosen["gpu_bytes"]},
        "planned_gpu": sum(spent[name] for name in PARTS) + chosen["gpu_bytes"],
        "planned_host": chosen["host_bytes"],
        "plan": chosen["name"],
        "auto": None if own is None or own.chosen is None else own.chosen.name,
        "peak": torch.cuda.max_memory_allocated() - held if on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() - held if on_gpu else 0,
        "card": spent["memory"] - spent["driver and other processes"],
        "failed_allocations": torch.cuda.memory_stats().get("num_ooms", 0) if on_gpu else 0,
        "memory": optimizer.memory(),
        "seconds": {"model": built, "first": steps[0], "step": statistics.median(steps[1:])},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


if __name__ == "__main__":
    print(json.dumps(train(json.loads(sys.argv[1]))))
