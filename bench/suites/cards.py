"""``python -m bench cards``: computed, not measured: which models can be fully fine-tuned on which card.

By the functions that allocate, and by the estimate of activations of ``adamw-triton plan``: one sequence of
2,048 tokens at a time, checkpointed, bf16 weights. Ours keeps these exactly and releases gradients. Beside it
torch's fused AdamW, whose state is bf16 then, and bitsandbytes' paged 8-bit one, whose state the driver
moves: both round weights to nearest and need all gradients at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import suite
from bench.finetuning import GIB, candidate, planned
from bench.report import RESULTS, Cell, Table
from bench.suites.limit import LLAMA_3B, LLAMA_8B

SEQUENCE = 2048
HOSTS = {"T4": "12GiB"}
"""Of the host, for paged state: a free notebook's; elsewhere a desktop's or a server's."""
DESKTOP, SERVER = "64GiB", "256GiB"
CARDS = ("T4", "RTX 3060", "RTX 4090", "RTX 5090", "A100-40GB", "A100-80GB", "H100 SXM")
_LLAMA_1B = LLAMA_3B | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
_QWEN_14B = LLAMA_8B | {
    "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40,
    "num_attention_heads": 40,
}  # fmt: skip
_QWEN_32B = _QWEN_14B | {
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "head_dim": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "1B": _LLAMA_1B, "3B": LLAMA_3B, "8B": LLAMA_8B, "14B": _QWEN_14B, "32B": _QWEN_32B,
}  # fmt: skip
"""Shapes of Llama 3.2 1B and 3B, Llama 3.1 8B, Qwen3 14B and 32B."""
TORCH, PAGED = "torch fused", "bitsandbytes paged 8-bit"
STATE = {TORCH: (4.0, 0.0), PAGED: (0.0, 2.03)}
"""Bytes a parameter on the GPU, and on the host."""


WEIGHTS = {"exact": "exact weights", "stochastic": "weights rounded stochastically"}


@dataclass(frozen=True)
class Fit:
    """One model on one card."""

    gpu: float
    """Bytes that it needs there, beside the driver's share and the plan's slack; of ours those it takes."""
    host: float
    fits: bool
    how: str = ""


def host_of(card: str) -> str:
    server = card.startswith(("A100", "H100"))
    return HOSTS.get(card, SERVER if server else DESKTOP)


def fits(name: str, card: str) -> dict[str, Fit]:
    """By optimizer."""
    given = {"gpu": card, "host": host_of(card), "seq": SEQUENCE}
    plan = planned(MODELS[name], given)
    spent = plan["devices"][0]["spent"]
    rest = spent["weights"] + spent["activations"]
    room = spent["memory"] - spent["driver and other processes"] - spent["slack"]
    chosen = candidate(plan, plan["chosen"])
    gradients = spent["gradients at one time"]
    found = {
        "adamw_triton": Fit(
            rest + gradients + (chosen["gpu_bytes"] if chosen else 0),
            chosen["host_bytes"] if chosen else 0,
            chosen is not None,
            f"{chosen['name']}, {WEIGHTS[chosen['weights']]}" if chosen else "",
        )
    }
    parameters = spent["weights"] / 2
    for peer, (on_gpu, on_host) in STATE.items():
        needs = rest + (2 + on_gpu) * parameters
        host = on_host * parameters
        found[peer] = Fit(needs, host, needs <= room and host <= float(given["host"][:-3]) * GIB)
    return found


def table(found: dict[str, dict[str, dict[str, Fit]]]) -> Table:
    """Of each card, the largest model with each optimizer."""
    keys = (TORCH, PAGED, "adamw_triton")
    rows: list[list[Cell | str]] = []
    for card, models in found.items():
        cells: list[Cell | str] = [card, host_of(card).replace("GiB", " GiB")]
        for key in keys:
            names = [name for name in models if models[name][key].fits]
            cells.append(Cell(names[-1] if names else "none", "bold" if key == "adamw_triton" else ""))
        last = [fit["adamw_triton"] for fit in models.values() if fit["adamw_triton"].fits]
        cells.append(
            f"{last[-1].gpu / GIB:.1f} GiB; {last[-1].host / GIB:.1f} GiB of the host; {last[-1].how}"
            if last
            else ""
        )
        rows.append(cells)
    columns = ["card", "host memory for it", *keys, "ours takes of the card"]
    notes = [
        "computed, not measured: the largest of Llama 3.2 1B and 3B, Llama 3.1 8B, Qwen3 14B and 32B; all "
        "weights trained, in bf16, one checkpointed sequence of 2,048 tokens at a time",
        "torch fused: bf16 state, weights rounded to nearest; bitsandbytes: the same with managed memory; "
        "ours: gradients released, exact weights where the host has room for what they lack",
    ]
    return Table("What can be fully fine-tuned on which card", columns, rows, notes)


def main(argv: Sequence[str]) -> int:
    """Compute, show and save."""
    parser = suite.parser("cards", __doc__)
    options = parser.parse_args(argv)
    options.out = options.out or RESULTS / "aot"
    found = {card: {name: fits(name, card) for name in MODELS} for card in CARDS}
    data = {
        "cards": {
            card: {name: {key: vars(fit) for key, fit in of.items()} for name, of in models.items()}
            for card, models in found.items()
        }
    }
    suite.finish("cards", argv, options, [table(found)], data)
    return 0
