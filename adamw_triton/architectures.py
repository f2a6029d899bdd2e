"""The weights of any architecture that transformers knows: built from config.json on the meta device.

transformers is imported here when it is needed, and never runs code of the model's own nor asks the network.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

from adamw_triton.models.architecture import Architecture, CannotBuildError, MissingLibraryError
from adamw_triton.models.config import LIMITS, SIZES, check_sizes
from adamw_triton.models.weights import Weight

_NOT_TO_BUILD = ("auto_map", "attn_implementation", "_attn_implementation", "use_pretrained_backbone")
"""Code of the model's own; kernels that may not be installed; weights from the network."""
_OFFLINE = "HF_HUB_OFFLINE"
_Answer = TypeVar("_Answer")


def build(config: Mapping[str, Any], dtype: str) -> Architecture:
    """A ``models.architecture.Build``: what the class that the config names has as parameters. Sizes that the
    config leaves out are the class's defaults.

    Raises:
        CannotBuildError: transformers is not installed, does not know the architecture or refuses the config.
    """
    return _ask(lambda name: _build(config, dtype, name), config)


def orders(config: Mapping[str, Any]) -> list[list[list[str]]]:
    """A ``models.architecture.Orders``: all that is trained in the model's own order; or in the groups of
    transformers' Trainer, those first that weight decay is for.

    Raises:
        CannotBuildError: as of ``build``.
    """
    return _ask(lambda name: _orders(config, name), config)


def _ask(question: Callable[[str], _Answer], config: Mapping[str, Any]) -> _Answer:
    """``question``: is given what to call transformers."""
    with _quiet():
        try:
            import transformers
        except ImportError:
            raise MissingLibraryError("transformers") from None
        except Exception as error:
            raise CannotBuildError(f"transformers cannot be imported: {_first_line(error)}") from None
        name = f"transformers {transformers.__version__}"
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
            raise CannotBuildError(f"{name} does not know model_type {kind!r:.60}")
        try:
            return question(name)
        except CannotBuildError:
            raise
        except Exception as error:  # whatever its classes make of numbers that do not go together
            raise CannotBuildError(f"{name} cannot build it: {_first_line(error)}") from None


def _build(config: Mapping[str, Any], dtype: str, name: str) -> Architecture:
    settings, model = _model(config, name)
    tables = _tables(model)
    weights = [
        Weight(key, tuple(param.shape), dtype, id(param) not in tables, param.requires_grad)
        for key, param in model.named_parameters()  # tied ones once
    ]
    inner = settings.get_text_config()
    sizes = {key: getattr(inner, key, None) for key in LIMITS}
    sizes["is_encoder_decoder"] = getattr(settings, "is_encoder_decoder", False)
    return Architecture(weights, f"{name} as {type(model).__name__}{_defaults(config, inner)}", sizes)


def _orders(config: Mapping[str, Any], name: str) -> list[list[list[str]]]:
    import transformers

    _, model = _model(config, name)
    trained = [key for key, param in model.named_parameters() if param.requires_grad]
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    groups = [[key for key in trained if (key in decayed) == decays] for decays in (True, False)]
    return [[trained], groups]


def _model(config: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Its settings, and the model on the meta device."""
    import torch
    import transformers

    kept = {key: value for key, value in config.items() if key not in _NOT_TO_BUILD}
    settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(kept)
    settings._attn_implementation = "eager"
    kind = _class_of(config, settings, name)
    # Random values take a millisecond each even on the meta device; releases 4 leave out the ties with them.
    without_values = getattr(transformers.modeling_utils, "no_init_weights", contextlib.nullcontext)
    with without_values(), torch.device("meta"):
        model = kind(_fitting(settings, kind, name))
        model.tie_weights()
    return settings, model


def _defaults(config: Mapping[str, Any], settings: Any) -> str:
    """Which sizes of the language model the config leaves to its class, as the end of a sentence."""
    said = {key for part in (config, *config.values()) if isinstance(part, Mapping) for key in part}
    found = []
    with contextlib.suppress(Exception):  # a class may have none for what it cannot do without
        usual = type(settings)()
        for key in SIZES:
            value = getattr(settings, key, None)
            unsaid = not {key, settings.attribute_map.get(key)} & said
            if unsaid and isinstance(value, int) and value == getattr(usual, key, None):
                found.append(f"{key} {value:,}")
    if found or not check_sizes(config):
        return ", by its defaults" + f" ({', '.join(found)})" * bool(found)
    return ""


def _class_of(config: Mapping[str, Any], settings: Any, name: str) -> Any:
    """The one that the config names; else that of its causal language model, or of what it has."""
    import transformers

    classes = config.get("architectures")
    if classes:
        named = classes[0] if isinstance(classes, list) else classes
        found = getattr(transformers, named, None) if isinstance(named, str) else None
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise CannotBuildError(f"{name} has no class {named!r:.60}")
        return found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(settings) in mapping:
            return mapping[type(settings)]
    raise CannotBuildError(f"config.json names no architectures, and {name} has no model for it")


def _fitting(settings: Any, kind: Any, name: str) -> Any:
    """The config that a class takes: the whole, or its part about language."""
    for candidate in (settings, settings.get_text_config()):
        if isinstance(candidate, kind.config_class):
            return candidate
    raise CannotBuildError(f"{name} makes no {kind.__name__} of model_type {settings.model_type!r}")


def _tables(model: Any) -> set[int]:
    """Ids of the matrices that embed, or that score the vocabulary."""
    from torch import nn

    head = model.get_output_embeddings()
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or (module is head and head is not None)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, logs and progress of libraries that are imported meanwhile, and no network."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with _offline(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """huggingface_hub reads the variable when it is imported, and then asks its constant."""
    before = os.environ.get(_OFFLINE)
    was_offline = getattr(_hub(), _OFFLINE, str(before).upper() in ("1", "ON", "YES", "TRUE"))
    os.environ[_OFFLINE] = "1"
    _set_offline(True)
    try:
        yield
    finally:
        _set_offline(was_offline)
        del os.environ[_OFFLINE]
        if before is not None:
            os.environ[_OFFLINE] = before


def _hub() -> ModuleType | None:
    return sys.modules.get("huggingface_hub.constants")


def _set_offline(offline: bool) -> None:
    if (hub := _hub()) is not None:
        setattr(hub, _OFFLINE, offline)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
