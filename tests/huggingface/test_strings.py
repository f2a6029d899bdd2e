"""Wherever transformers takes the name of an optimizer, it takes ours."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import io
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import yaml
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import adamw_triton.huggingface
from adamw_triton.huggingface import OPTIMIZERS, registration
from tests.huggingface.child import variant_in_the_child
from tests.huggingface.tiny import arguments

optims = pytest.mark.parametrize("optim", OPTIMIZERS)


def parser() -> Any:
    return HfArgumentParser(TrainingArguments)


@optims
def test_they_are_members_like_any_other(optim: str) -> None:
    member = OptimizerNames(optim)
    assert member is OptimizerNames[optim.upper()] is getattr(OptimizerNames, optim.upper())
    assert isinstance(member, OptimizerNames)
    assert isinstance(member, str)
    assert (member.value, member.name, str(member)) == (
        optim,
        optim.upper(),
        f"OptimizerNames.{optim.upper()}",
    )
    assert member == optim
    assert member in set(OptimizerNames)
    assert member in OptimizerNames
    assert list(OptimizerNames).count(member) == 1
    assert len(OptimizerNames) == len(set(OptimizerNames)) == len(OptimizerNames.__members__)


def test_an_unknown_name_is_refused_with_ours_among_the_allowed() -> None:
    with pytest.raises(ValueError, match=r"adamw_triton_9bit is not a valid .*'paged_adamw_triton_8bit'"):
        OptimizerNames("adamw_triton_9bit")


@optims
def test_keyword(optim: str, tmp_path: Path) -> None:
    assert arguments(tmp_path, optim).optim is OptimizerNames(optim)
    args = arguments(tmp_path, "adamw_torch").set_optimizer(
        name=optim, learning_rate=1e-4, args="block_size=256"
    )
    assert args.optim is OptimizerNames(optim)
    assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["block_size"] == 256


@optims
def test_command_line(optim: str, tmp_path: Path) -> None:
    words = [
        "--output_dir",
        str(tmp_path),
        "--optim",
        optim,
        "--optim_args",
        "block_size=256,memory_budget=1GiB",
    ]
    (args,) = parser().parse_args_into_dataclasses(words)
    assert args.optim is OptimizerNames(optim)
    assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["memory_budget"] == "1GiB"


def test_the_command_lines_help_lists_them() -> None:
    (option,) = [action for action in parser()._actions if "--optim" in action.option_strings]
    assert set(OPTIMIZERS) < set(option.choices)
    assert "paged_adamw_triton_8bit" in "".join(parser().format_help().split())


@optims
@pytest.mark.parametrize("kind", ["yaml", "json", "dict"])
def test_files(kind: str, optim: str, tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "optim": optim, "optim_args": "block_size=256"}
    file = tmp_path / f"train.{kind}"
    if kind == "yaml":
        file.write_text(yaml.safe_dump(settings))
        (args,) = parser().parse_yaml_file(str(file))
    elif kind == "json":
        file.write_text(json.dumps(settings))
        (args,) = parser().parse_json_file(str(file))
    else:
        (args,) = parser().parse_dict(settings)
    assert args.optim is OptimizerNames(optim)
    assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["variant"] == OPTIMIZERS[optim]


def test_a_mapping_in_yaml_serves_as_optim_args(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\noptim: paged_adamw_triton_8bit\n"
        "optim_args: {block_size: 256, memory_budget: 2GiB, maximize: true}\n"
    )
    (args,) = parser().parse_yaml_file(str(file))
    kwargs = Trainer.get_optimizer_cls_and_kwargs(args)[1]
    assert (kwargs["block_size"], kwargs["memory_budget"], kwargs["maximize"]) == (256, "2GiB", True)


@optims
def test_round_trips(optim: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, optim)
    assert args.to_dict()["optim"] == optim
    assert json.loads(args.to_json_string())["optim"] == optim
    assert arguments(tmp_path, args.to_dict()["optim"]).optim is args.optim
    assert copy.copy(args).optim is args.optim
    assert copy.deepcopy(args).optim is args.optim
    assert dataclasses.replace(args, seed=3).optim is args.optim
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(args, protocol)).optim is args.optim
    file = io.BytesIO()
    torch.save(args, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).optim is args.optim


@pytest.mark.slow
def test_a_spawned_child_that_has_not_registered_knows_them(tmp_path: Path) -> None:
    """Data loaders and launchers spawn; unpickling the arguments registers."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    args = arguments(tmp_path, "paged_adamw_triton_8bit")
    child = context.Process(target=variant_in_the_child, args=(args, queue))
    child.start()
    child.join(300)
    assert child.exitcode == 0
    assert queue.get() == "paged_8bit"


def test_registering_again_changes_nothing() -> None:
    members, method = list(OptimizerNames), Trainer.get_optimizer_cls_and_kwargs
    adamw_triton.huggingface.register()
    importlib.reload(registration).register()
    assert list(OptimizerNames) == members
    assert all(a is b for a, b in zip(OptimizerNames, members, strict=True))
    assert Trainer.get_optimizer_cls_and_kwargs is method


def test_transformers_own_members_are_as_they_were() -> None:
    assert pickle.loads(pickle.dumps(OptimizerNames.ADAMW_TORCH)) is OptimizerNames.ADAMW_TORCH
    assert OptimizerNames("adamw_bnb_8bit") is OptimizerNames.ADAMW_BNB
    assert "__reduce_ex__" not in vars(OptimizerNames.ADAMW_TORCH)
