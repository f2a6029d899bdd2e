"""`adamw-triton plan`: what can be fine-tuned on a card, and with which variant."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adamw_triton.choices import ACCUMULATE_ON, PREFERENCES, SHARDINGS
from adamw_triton.commands import fail
from adamw_triton.memory.units import format_bytes, parse_bytes
from adamw_triton.models import Model, read_model, sketches
from adamw_triton.models.sketch import LARGEST
from adamw_triton.selection.cards import parse_gpu

if TYPE_CHECKING:
    from torch import Tensor

    from adamw_triton.models.finetuning import Run

NOTHING_FITS = 1
DTYPES = ("fp32", "bf16", "fp16")
TARGETS = ("attention", "all-linear")
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
    add_option(
        "--lora-targets", metavar="WHICH", default=TARGETS[0], help="attention (default) or all-linear"
    )
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


class Question(NamedTuple):
    """The arguments, checked."""

    gpu: str | int | None
    host: int | None
    activations: int | None


class Answer(NamedTuple):
    """For one model."""

    model: Model
    run: Run
    tensors: Sequence[Tensor]
    activations: int | None
    origin: str
    """Of ``activations``."""
    plan: Any

    @property
    def room(self) -> int:
        """Bytes that the whole 32-bit state leaves on the GPU."""
        return int(self.plan.limits[0].room - self.plan.candidates[0].gpu_bytes)


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; the exit code."""
    try:
        question = check(arguments)
        answers = [answer(arguments, question, model) for model in find_models(arguments)]
        # Of guesses the one that needs most: no model of that size is to be promised more than it has.
        found = answers[0] if len(answers) == 1 else min(answers, key=lambda answer: answer.room)
    except ValueError as error:
        return fail("plan", str(error))
    if arguments.json:
        print(json.dumps(as_dict(found), indent=2))
    else:
        print(f"{found.model.name}: {describe(found.model, found.run, found.tensors)}")
        print(f"counted: {found.model.counted}")
        print(f"activations: {found.origin}")
        if arguments.release and not _releases(arguments):
            print("gradients: accumulated, and so all there until the last backward, --release or not")
            print("           (--accumulate-on host keeps them in host memory)")
        show(found.plan)
    return NOTHING_FITS if found.plan.chosen is None else 0


def answer(arguments: argparse.Namespace, question: Question, model: Model) -> Answer:
    """Plan for one model."""
    run = how_trained(arguments, model)
    from adamw_triton.models import finetuning

    tensors = finetuning.tensors(model.weights, run)
    activations, origin = count_activations(arguments, model, run, tensors, question.activations)
    tokens = arguments.batch * arguments.seq if _goes_through_all(model, run) else None
    named = [*zip((weight.name for weight in model.weights), tensors, strict=False)]
    adapters = [("", tensor) for tensor in tensors[len(named) :]]
    found = ask([*named, *adapters], question, activations, arguments, tokens)
    return Answer(model, run, tensors, activations, origin, found)


def _goes_through_all(model: Model, run: Run) -> bool:
    """Whether each token meets every weight: not with experts, nor are there weights to count in codes."""
    return model.dimensions is not None and model.dimensions.visited == 1 and not run.quantized


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
        ("--lora-targets", arguments.lora_targets, TARGETS),
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


def how_trained(arguments: argparse.Namespace, model: Model) -> Run:
    """What is held in 4 bits already stays so; of other codes there is no plan but one for such a base.

    Raises:
        ValueError: codes are to be trained themselves.
    """
    from adamw_triton.models.finetuning import DTYPES, Run

    in_4_bits = arguments.quantized_base is not None
    if model.quantized is not None and model.quantized.is_4bit_base:
        in_4_bits = True
        if arguments.lora is None:
            raise ValueError(
                f"{model.name} is held in 4 bits (bitsandbytes), which cannot be trained themselves: give "
                "--lora RANK, or name a folder of the model in 16 or 32 bits"
            )
    elif model.quantized is not None and not in_4_bits:
        raise ValueError(
            f"{model.name} is quantized, in {model.quantized.format}: such weights cannot be trained. Give "
            "--lora RANK --quantized-base 4, which plans for holding it in 4 bits (NF4), or name a folder of "
            "the model in 16 or 32 bits"
        )
    return Run(
        dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
        rank=arguments.lora,
        targets=arguments.lora_targets,
        quantized=in_4_bits,
    )


def count_activations(
    arguments: argparse.Namespace, model: Model, run: Run, tensors: Sequence[Tensor], given: int | None
) -> tuple[int | None, str]:
    """Bytes, None if nothing can be said of them; and where the figure is from."""
    from adamw_triton.models.activations import Batch, estimate
    from adamw_triton.models.finetuning import workload
    from adamw_triton.state.placement import live_bytes

    if given is not None:
        return given, f"{format_bytes(given)}, as given"
    if model.dimensions is None:
        return None, f"not counted: {model.remark}; give --activations"
    batch = Batch(
        arguments.batch, arguments.seq, not arguments.no_checkpointing,
        arguments.accumulation > 1 and not _releases(arguments), _releases(arguments),
    )  # fmt: skip
    work = workload(model.weights, run, model.dimensions.visited)
    if batch.released:
        work = work._replace(gradients=live_bytes(t.nbytes for t in tensors if t.requires_grad))
    if arguments.sharding == "full":
        work = work._replace(gradients=work.gradients // arguments.ranks)
    count = estimate(model.dimensions, batch, work)
    return count, (
        f"about {format_bytes(count)}, estimated for {batch.sequences} x {batch.length} tokens "
        f"with{'' if batch.checkpointing else 'out'} gradient checkpointing"
        f"{'; ' if model.remark else ''}{model.remark}"
    )


def _releases(arguments: argparse.Namespace) -> bool:
    """Whether few gradients are there at one time: all of them are where they add up on the GPU."""
    return bool(arguments.release) and (arguments.accumulation == 1 or arguments.accumulate_on == "host")


def ask(
    named: Sequence[tuple[str, Tensor]],
    question: Question,
    activations: int | None,
    arguments: argparse.Namespace,
    tokens: int | None,
) -> Any:
    """The Plan."""
    import torch

    import adamw_triton
    from adamw_triton.models import finetuning

    if question.gpu is None and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: say which with --gpu, like T4 or 24GiB")
    return adamw_triton.plan(
        named,
        question.gpu,
        question.host,
        activations=activations,
        prefer=arguments.prefer,
        gradient_release=arguments.release,
        accumulation=arguments.accumulation,
        accumulate_on=arguments.accumulate_on,
        accumulate_dtype=finetuning.DTYPES.get(arguments.accumulate_dtype),
        tokens=tokens,
        checkpointing=not arguments.no_checkpointing,
        ranks=arguments.ranks,
        sharding=arguments.sharding,
    )


def describe(model: Model, run: Run, tensors: Sequence[Tensor]) -> str:
    """What is trained, in a line."""
    from adamw_triton.models.finetuning import dtype_of

    total = sum(weight.numel for weight in model.weights)
    trained = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
    dtype = str(dtype_of(model.weights, run)).removeprefix("torch.")
    if run.rank is None:
        how = "all" if trained == total else f"{trained:,} of them"
        return f"{total:,} parameters in {dtype}, {how} trained"
    base = f"{dtype}, projections in 4 bits" if run.quantized else dtype
    lora = f"LoRA of rank {run.rank} on {run.targets}"
    return f"{total:,} frozen parameters in {base}; {trained:,} trained in float32, {lora}"


def as_dict(found: Answer) -> dict[str, Any]:
    return {
        "model": found.model.name,
        "parameters": sum(weight.numel for weight in found.model.weights),
        "counted": found.model.counted,
        "trained": sum(tensor.numel() for tensor in found.tensors if tensor.requires_grad),
        "activations": found.activations,
        "activations_from": found.origin,
        "plan": found.plan.to_dict(),
    }


def show(found: Any) -> None:
    """With rich where it is installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(found)
    else:
        Console().print(found)
