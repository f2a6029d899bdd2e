"""One model, trained as the command line says, on one card: what the selector is asked, and what is said."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from adamw_triton.memory.units import format_bytes
from adamw_triton.models import Model

if TYPE_CHECKING:
    from torch import Tensor

    from adamw_triton.models.finetuning import Run

TARGETS = ("attention", "all-linear")
"""To what LoRA is put; the first where nobody says."""


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
    is_released_in_vain: bool
    """Gradients are to be used up at once, and are all there nevertheless."""

    @property
    def room(self) -> int:
        """Bytes that the whole 32-bit state leaves on the GPU."""
        return int(self.plan.limits[0].room - self.plan.candidates[0].gpu_bytes)


def hungriest(arguments: argparse.Namespace, question: Question, models: Sequence[Model]) -> Answer:
    """Of guesses the one that needs most: no model of that size is to be promised more than it has.

    Raises:
        ValueError: no model can be trained so.
    """
    answers = [answer(arguments, question, model) for model in models]
    return answers[0] if len(answers) == 1 else min(answers, key=lambda answer: answer.room)


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
    in_vain = arguments.release and not _releases(arguments)
    return Answer(model, run, tensors, activations, origin, found, in_vain)


def _goes_through_all(model: Model, run: Run) -> bool:
    """Whether each token meets every weight: not with experts, nor are there weights to count in codes."""
    return model.dimensions is not None and model.dimensions.visited == 1 and not run.quantized


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
        targets=arguments.lora_targets or TARGETS[0],
        quantized=in_4_bits,
    )


def count_activations(
    arguments: argparse.Namespace, model: Model, run: Run, tensors: Sequence[Tensor], given: int | None
) -> tuple[int | None, str]:
    """Bytes, None if nothing can be said of them; and where the figure is from."""
    from adamw_triton.models.activations import Batch, counted, estimate
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
    return count, "; ".join(
        filter(
            None,
            (
                f"about {format_bytes(count)}, estimated for {batch.sequences} x {batch.length} tokens "
                f"with{'' if batch.checkpointing else 'out'} gradient checkpointing",
                counted(model.dimensions, batch, work),
                model.remark,
            ),
        )
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


def lines(found: Answer) -> Iterator[str]:
    """What a plan is of, for people."""
    yield f"{found.model.name}: {describe(found.model, found.run, found.tensors)}"
    yield f"counted: {found.model.counted}"
    yield f"activations: {found.origin}"
    if found.is_released_in_vain:
        yield (
            "gradients: accumulated, and so all there until the last backward, --release or not "
            "(--accumulate-on host keeps them in host memory)"
        )


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
