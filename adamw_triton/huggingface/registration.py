"""Make our names known to transformers, which has no registry for optimizers.

``OptimizerNames`` is a closed enum: its members are what ``TrainingArguments`` accepts and what
command lines offer. So real members are added to it. Which class a name stands for is decided in the
public static method ``Trainer.get_optimizer_cls_and_kwargs``, which is wrapped. Both have been so from
transformers 4.46 to 5.24.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from enum import Enum
from typing import Any

from adamw_triton.installing import command
from adamw_triton.trainer_arguments import OPTIMIZERS, optimizer_cls_and_kwargs

_OURS = "_dispatches_adamw_triton"
_ENUM_TABLES = {"_member_map_": dict, "_value2member_map_": dict, "_member_names_": list}


def register() -> None:
    """Add our names to ``optim=``. Calling it again does nothing.

    Raises:
        ImportError: transformers is missing, or not one whose optimizers can be extended.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            f"adamw_triton.huggingface needs transformers, which is not installed: {command('hf')}",
            name="transformers",
        ) from None
    try:
        names = getattr(importlib.import_module("transformers.training_args"), "OptimizerNames", None)
        trainer = getattr(importlib.import_module("transformers.trainer"), "Trainer", None)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("transformers"):
            raise  # something that transformers itself needs
        raise _unknown(transformers.__version__, str(error)) from error
    problem = _problem_with(names, trainer)
    if problem:
        raise _unknown(transformers.__version__, problem)
    _add_members(names)
    _wrap(trainer)


def _problem_with(names: Any, trainer: Any) -> str | None:
    """What is not as we know it; None if nothing."""
    if not (isinstance(names, type) and issubclass(names, str) and issubclass(names, Enum)):
        return "OptimizerNames is not an enum of strings"
    for table, kind in _ENUM_TABLES.items():
        if not isinstance(getattr(names, table, None), kind):
            return f"OptimizerNames has no {kind.__name__} {table}"
    method = inspect.getattr_static(trainer, "get_optimizer_cls_and_kwargs", None)
    if not isinstance(method, staticmethod):
        return "Trainer has no static method get_optimizer_cls_and_kwargs"
    parameters = list(inspect.signature(method.__func__).parameters)
    if parameters[:2] != ["args", "model"]:
        return f"Trainer.get_optimizer_cls_and_kwargs takes ({', '.join(parameters)}), not (args, model)"
    return None


def _unknown(version: str, problem: str) -> ImportError:
    return ImportError(
        f"transformers {version} is not as adamw_triton knows it ({problem}), so optim= cannot be taught "
        f"our names. Its official way needs no registration: Trainer(..., optimizer_cls_and_kwargs="
        "optimizer_cls_and_kwargs(args, variant='8bit')), with "
        "from adamw_triton.trainer_arguments import optimizer_cls_and_kwargs",
        name="transformers",
    )


def _add_members(names: Any) -> None:
    for value in OPTIMIZERS:
        if value not in names._value2member_map_:
            _add_member(names, value)


def _add_member(names: Any, value: str) -> None:
    """What the enum's own machinery does for a member in the class's body."""
    member: Any = str.__new__(names, value)
    member._name_ = value.upper()
    member._value_ = value
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    # A process that unpickles a member (a spawned worker, `torch.load` of training arguments) may not
    # have registered yet: so members are pickled by way of this module.
    member.__reduce_ex__ = functools.partial(_reduce, value)
    type.__setattr__(names, member._name_, member)  # the enum's own __setattr__ forbids it
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[value] = member


def _reduce(value: str, _protocol: Any) -> tuple[Any, tuple[str]]:
    return member_named, (value,)


def member_named(value: str) -> Any:
    """Of ``OptimizerNames``; importing this module's package has registered it."""
    return importlib.import_module("transformers.training_args").OptimizerNames(value)


def _wrap(trainer: Any) -> None:
    original = trainer.get_optimizer_cls_and_kwargs
    if hasattr(original, _OURS):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        if getattr(args.optim, "value", args.optim) in OPTIMIZERS:
            return optimizer_cls_and_kwargs(args)
        found: tuple[Any, Any] = original(args, model)
        return found

    setattr(get_optimizer_cls_and_kwargs, _OURS, True)
    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
