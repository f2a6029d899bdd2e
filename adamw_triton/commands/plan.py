"""`adamw-triton plan`: what can be fine-tuned on a card, and with which variant."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from adamw_triton.choices import ACCUMULATE_ON, PREFERENCES, SHARDINGS
from adamw_triton.commands import fail
from adamw_triton.fits import changes
from adamw_triton.fits.answers import TARGETS, Answer, Question, as_dict, hungriest, lines
from adamw_triton.memory.units import parse_bytes
from adamw_triton.models import Model, read_model, sketches
from adamw_triton.models.sketch import LARGEST
from adamw_triton.selection.cards import parse_gpu
from adamw_triton.selection.table import INDENT, WIDTH, fill

NOTHING_FITS = 1
DTYPES = ("fp32", "bf16", "fp16")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
FEWEST = 1000
"""Parameters; whoever writes fewer has left out a unit."""
LARGEST_RANK = 1 << 16
LARGEST_BATCH = 1 << 24

SUMMARY = "which variant of AdamW lets a model train on a GPU: memory by place, time of a step"
EPILOG = """\
examples:
  adamw-triton plan ./Llama-3.2-3B --gpu T4
  adamw-triton plan ./Llama-3.1-70B --gpu A100-80GB --lora 16
  adamw-triton plan --params 7e9 --gpu 16GiB --lora 16 --quantized-base 4

where nothing fits, the least changes that would let it are tried and printed

exit code: 0 something fits, 1 nothing does, 2 the arguments or the model's files are wrong"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-command `plan`."""
    parser = commands.add_parser(
        "plan",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=plan)
    add_option = parser.add_argument
    add_option("model", nargs="?", help="folder, safetensors file or config.json; no weights are loaded")
    add_option("--params", metavar="N", help="number of parameters instead: 7e9, 7B, 350M")
    add_option("--gpu", help="a card like T4 or its memory like 24GiB (default: the GPU that is here)")
    add_option(
        "--host-memory", metavar="SIZE", help="for paged state, like 32GiB (default: what is free here)"
    )
    add_option("--dtype", help=f"of the weights: {', '.join(DTYPES)} (default: as they are stored)")
    add_option("--lora", type=int, metavar="RANK", help="train adapters of this rank instead of all weights")
    add_option("--lora-targets", metavar="WHICH", help="attention (default) or all-linear")
    add_option(
        "--quantized-base", type=int, metavar="BITS", help="hold the frozen projections in 4 bits (NF4)"
    )
    add_option("--batch", type=int, default=1, help="sequences at a time (default: %(default)s)")
    add_option("--seq", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    add_option(
        "--accumulation", type=int, default=1, metavar="BATCHES", help="before a step (default: %(default)s)"
    )
    add_option(
        "--release", action="store_true", help="use gradients up during backward (gradient_release=True)"
    )
    add_option(
        "--accumulate-on", metavar="WHERE", default="gpu",
        help="where gradients add up before a step: gpu (default), or host, with --release",
    )  # fmt: skip
    add_option(
        "--accumulate-dtype", metavar="DTYPE",
        help="of sums on the host: fp32 (default: the gradients')",
    )  # fmt: skip
    add_option("--ranks", type=int, default=1, help="GPUs of this machine that train together (default: 1)")
    add_option(
        "--sharding", metavar="HOW", default="full",
        help="of several ranks: full (default), as FSDP2, or none, as DDP",
    )  # fmt: skip
    add_option("--no-checkpointing", action="store_true", help="keep all activations instead of recomputing")
    add_option(
        "--activations", metavar="SIZE", help="of forward and backward, measured (default: an estimate)"
    )
    add_option("--prefer", default="speed", help="speed (default), or exact: keep 32-bit state, page instead")
    add_option("--json", action="store_true", help="for programs")


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; the exit code."""
    try:
        question = check(arguments)
        models = find_models(arguments)
        found = hungriest(arguments, question, models)
        ways = [] if found.plan.chosen else changes.that_fit(arguments, question, models)
    except ValueError as error:
        return fail("plan", str(error))
    if arguments.json:
        print(json.dumps({**as_dict(found), "would_fit": [way._asdict() for way in ways]}, indent=2))
    else:
        show(found, ways)
    return 0 if found.plan.chosen else NOTHING_FITS


def show(found: Answer, ways: Sequence[changes.Way]) -> None:
    """Lines as wide as the terminal; the table with rich where it is installed."""
    draw: Callable[[Any], None] = print
    width = WIDTH
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        pass
    else:
        draw, width = Console().print, Console().width
    for line in lines(found):
        print(fill(line, width, INDENT))
    draw(found.plan)
    if not found.plan.chosen:
        for line in changes.lines(ways):
            print(fill(line, width, INDENT * 2))


def check(arguments: argparse.Namespace) -> Question:
    """Refuse what cannot be meant, before anything is read.

    Raises:
        ValueError: in one line.
    """
    for name, value, largest in (
        ("--batch", arguments.batch, LARGEST_BATCH),
        ("--seq", arguments.seq, LARGEST_BATCH),
        ("--accumulation", arguments.accumulation, LARGEST_BATCH),
        ("--lora", arguments.lora, LARGEST_RANK),
        ("--ranks", arguments.ranks, LARGEST_RANK),
    ):
        if value is not None and not 1 <= value <= largest:
            raise ValueError(f"{name} must be 1 to {largest:,}, not {value}")
    for name, value, allowed in (
        ("--dtype", arguments.dtype, (None, *DTYPES)),
        ("--lora-targets", arguments.lora_targets, (None, *TARGETS)),
        ("--accumulate-dtype", arguments.accumulate_dtype, (None, "fp32")),
        ("--quantized-base", arguments.quantized_base, (None, 4)),
        ("--sharding", arguments.sharding, SHARDINGS),
        ("--prefer", arguments.prefer, PREFERENCES),
        ("--accumulate-on", arguments.accumulate_on, ACCUMULATE_ON),
    ):
        if value not in allowed:
            names = " or ".join(str(choice) for choice in allowed if choice is not None)
            raise ValueError(f"{name} must be {names}, not {value!r}")
    if arguments.quantized_base is not None and arguments.lora is None:
        raise ValueError(
            "--quantized-base needs --lora RANK: weights held in 4 bits cannot be trained themselves"
        )
    if arguments.lora_targets is not None and arguments.lora is None:
        raise ValueError("--lora-targets needs --lora RANK: without it all weights are trained")
    if arguments.ranks > 1 and arguments.release:
        raise ValueError(f"--release is for one GPU, not for --ranks {arguments.ranks}")
    if arguments.accumulate_on == "host" and not arguments.release:
        raise ValueError("--accumulate-on host needs --release: without it all gradients are there at once")
    if arguments.accumulate_dtype is not None and arguments.accumulate_on != "host":
        raise ValueError(
            "--accumulate-dtype needs --accumulate-on host: elsewhere gradients keep their dtype"
        )
    if (arguments.model is None) == (arguments.params is None):
        raise ValueError("name a model's folder or file, or its size as --params; one of them")
    return Question(
        gpu=None if arguments.gpu is None else _card(arguments.gpu),
        host=_bytes(arguments.host_memory, "--host-memory"),
        activations=_bytes(arguments.activations, "--activations"),
    )


def _bytes(text: str | None, option: str) -> int | None:
    return None if text is None else parse_bytes(text, option)


def _card(text: str) -> str | int:
    """Its name, as the table has it, or its bytes."""
    found = parse_gpu(text, "--gpu")
    return found if isinstance(found, int) else found.name


def parse_count(text: str) -> int:
    """A number of parameters: ``"7e9"``, ``"7B"``, ``"350M"``.

    Raises:
        ValueError: it is none, or absurd.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(e\+?\d{1,3})?\s*([kmbt]?)\s*", text, re.IGNORECASE | re.ASCII)
    count = Decimal(0)
    if found:
        count = Decimal(found[1] + (found[2] or "")) * UNITS[found[3].lower()]
    if FEWEST <= count <= LARGEST and count == int(count):
        return int(count)
    bare = 0 < count < FEWEST and found and not any(found.groups()[1:])
    raise ValueError(
        f"--params must be a number from {FEWEST:,} to {LARGEST:.0e}, and whole, like 7e9, 1.5B or 350M, not "
        f"{text!r}" + f"; did you mean '{text.strip()}B'?" * bool(bare)
    )


def find_models(arguments: argparse.Namespace) -> Sequence[Model]:
    """The model that is named, or what one of so many parameters may look like."""
    if arguments.params is None:
        from adamw_triton.architectures import build

        return [read_model(Path(arguments.model), build)]
    count = parse_count(arguments.params)
    models = sketches(count)
    if arguments.lora is not None and models[0].dimensions is None:
        raise ValueError(
            f"--lora needs the shapes of a model of {count:,} parameters: name its folder or file"
        )
    return models
