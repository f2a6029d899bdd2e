"""``python -m bench limit``: full fine-tuning of whole models where there is hardly room for their weights.

By an unmodified Trainer, with exact weights and gradient release: a 3B Llama, whose peak is held against what
`adamw-triton plan` says of its config.json; Llama-3.1-8B, and the deepest model of its shape that the plan
lets in, on a GPU of which a balloon leaves what a card of 24 GB has. Weights are random: what is measured is
memory and time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from bench import children, suite
from bench.finetuning import GIB, planned
from bench.report import Cell, Table, number

CARD, HOST = "4090", "64GiB"
DEEPEST = 64
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
_LLAMA |= {"vocab_size": 128256, "num_key_value_heads": 8}
LLAMA_3B = _LLAMA | {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = _LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY = _LLAMA | {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
PAGED = {"optim": "paged_adamw_triton_8bit", "optim_args": "gradient_release=true,master_weights=true"}
AUTO = {"optim": "adamw_triton", "optim_args": "gradient_release=true"}


def tasks(quick: bool) -> dict[str, dict[str, Any]]:
    """By name, what a child is given."""
    common = {"gpu": CARD, "host": HOST, "seq": 2048, "steps": 5}
    if quick:
        small = common | {"config": TINY, "seq": 128, "limited": False, "variant": "8bit, paged"}
        return {"tiny": small | PAGED}
    named = {"limited": False, "variant": "8bit, paged"} | PAGED
    auto = {"limited": True, "variant": None} | AUTO
    return {
        "Llama-3.2-3B": common | {"config": LLAMA_3B} | named,
        "Llama-3.1-8B in 24 GB": common | {"config": LLAMA_8B} | auto,
        "the deepest in 24 GB": common | {"config": deepest(common)} | auto,
    }


def deepest(given: dict[str, Any]) -> dict[str, Any]:
    """The shape of the 8B model, with as many layers as the plan lets in."""
    fewest, most = LLAMA_8B["num_hidden_layers"], DEEPEST
    while most - fewest > 1:
        middle = (fewest + most) // 2
        if planned(LLAMA_8B | {"num_hidden_layers": middle}, given)["chosen"] is not None:
            fewest = middle
        else:
            most = middle
    return LLAMA_8B | {"num_hidden_layers": fewest}


def run(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One child's figures; else why there are none."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "bench.finetuning", json.dumps(task)]
        code = children.run(command, seconds, children.environment(), log)
        log.seek(0)
        said = log.read()
    if code != 0:
        how = "stopped at the end of its time" if code is None else f"it ended with {code}"
        return {
            "why": f"{how}: {said.strip().splitlines()[-1][:300] if said.strip() else 'nothing was said'}"
        }
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    peak, wanted = found["peak"], found["planned_gpu"]
    off = {"off_plan": abs(peak - wanted) / wanted} if peak else {}
    return found | {"layers": task["config"]["num_hidden_layers"]} | off


def table(found: dict[str, dict[str, Any]]) -> Table:
    rows: list[list[Cell | str]] = []
    for name, got in found.items():
        if "why" in got:
            rows.append([name, f"no figures: {got['why'][-300:]}", *[""] * 8])
            continue
        seconds, host = got["seconds"], got["memory"]["host"]
        rows.append([
            Cell(name, "bold"), f"{got['parameters'] / 1e9:.2f}e9, {got['layers']} layers",
            got["auto"] or got["plan"], f"{got['planned_gpu'] / GIB:.2f} GiB", f"{got['peak'] / GIB:.2f} GiB",
            f"{got['reserved'] / GIB:.2f} GiB", f"{got['off_plan']:.1%}" if "off_plan" in got else "",
            f"{host / GIB:.1f} GiB", f"{number(seconds['step'])} s",
            f"{got['losses'][0]:.2f} to {got['losses'][-1]:.2f}",
        ])  # fmt: skip
    columns = [
        "model",
        "parameters",
        "state",
        "GPU: planned",
        "peak",
        "reserved",
        "off",
        "host",
        "a step",
        "loss",
    ]
    notes = [
        "one sequence of 2,048 tokens a step, checkpointed, bf16 weights kept exactly, gradients released; "
        "peak and reserved: what torch has allocated at most, and what it took of the GPU for it, without "
        "the balloon",
        f"in 24 GB: of the GPU a balloon leaves what a {CARD} has beside its driver's share, and the slack "
        "that auto keeps of the larger one; what is left auto fills with state",
    ]
    return Table("Full fine-tuning with released gradients", columns, rows, notes)


def main(argv: Sequence[str]) -> int:
    """Train, show and save; 0 if every model trained."""
    parser = suite.parser("limit", __doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for all of them (default 600)")
    options = parser.parse_args(argv)
    end = time.monotonic() + options.seconds
    found: dict[str, dict[str, Any]] = {}
    for name, task in tasks(options.quick or options.device == "cpu").items():
        left = end - time.monotonic()
        found[name] = run(task, left) if left > 1 else {"why": "no time was left"}
        data = {"card": CARD, "models": found}
        suite.write("limit", argv, options, [table(found)], data)
    suite.finish("limit", argv, options, [table(found)], data)
    return int(any("why" in got for got in found.values()))
