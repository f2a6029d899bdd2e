"""A model on disk: a folder, a safetensors file or an index of some, or a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adamw_triton.models import elsewhere, quantized, stored
from adamw_triton.models.architecture import (
    Architecture,
    Build,
    CannotBuildError,
    MissingLibraryError,
    unknown,
)
from adamw_triton.models.config import Dimensions, check_sizes, language_part, read_dimensions, read_dtype
from adamw_triton.models.families import FAMILIES, UntoldError, weights_of
from adamw_triton.models.headers import read_header, read_shards
from adamw_triton.models.weights import IncompleteError, ModelFileError, Weight, cannot_read, read_json


class Model(NamedTuple):
    """What its files say of it."""

    name: str
    weights: Sequence[Weight]
    """Its parameters."""
    dimensions: Dimensions | None
    """None where they are not known, or mean something else than a decoder's."""
    counted: str = ""
    """Who told the weights, and from what."""
    remark: str = ""
    """Of the dimensions: what is unknown, or left out."""
    quantized: quantized.Quantized | None = None
    """How its files hold the projections, if in codes; ``weights`` are those that it was quantized from."""


def read_model(path: Path, build: Build = unknown) -> Model:
    """Build its architecture if ``build`` can; else read the headers of all its safetensors files; without
    any, tell its weights from config.json by a table of families.

    Raises:
        ModelFileError: there is nothing at ``path``, or not what there should be.
    """
    try:
        return _read(path, build)
    except OSError as error:  # of looking about; whoever opens a file names that one
        raise cannot_read(path, error) from None


def _read(path: Path, build: Build) -> Model:
    if path.is_dir():
        return _folder(path, build)
    if not path.exists():
        raise elsewhere.refuse_missing(path)
    elsewhere.check_file(path)
    if path.name.endswith(".safetensors.index.json"):
        return _count(path.resolve().parent.name, _config(path.parent), _some(read_shards(path), path), build)
    if path.name.endswith(".json"):
        config = read_json(path)
        if "model_type" not in config:
            raise ModelFileError(f"{path} is not a model's config.json: it names no model_type")
        return _count(path.resolve().parent.name, config, None, build)
    whole = build if _is_main(path) else unknown
    return _count(path.name, _config(path.parent), _some(read_header(path), path), whole)


def _folder(path: Path, build: Build) -> Model:
    elsewhere.check_folder(path)
    config = _config(path)
    try:
        weights = _read_weights(path)
    except IncompleteError:
        if config is None:
            raise
        weights = None
    if weights is None:
        elsewhere.refuse_bare(path, config is not None)
    return _count(path.resolve().name, config, None if weights is None else _some(weights, path), build)


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return read_json(path) if path.exists() else None


def _read_weights(folder: Path) -> list[Weight] | None:
    """By its index, or its one file, or all its files; None where it has none."""
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: not _is_main(path))
    if indexes:
        return read_shards(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    main = [file for file in files if _is_main(file)]
    if not files:
        return None
    weights = [weight for file in main or files for weight in read_header(file)]
    if len({weight.name for weight in weights}) < len(weights):
        raise ModelFileError(
            f"{folder} has several safetensors files with the same tensors: name one of them"
        )
    return weights


def _is_main(path: Path) -> bool:
    """The name that transformers gives it."""
    return path.name.startswith("model.safetensors")


def _some(weights: list[Weight], path: Path) -> list[Weight]:
    if not weights:
        raise ModelFileError(f"{path} has no tensors")
    return weights


def _count(name: str, said: Mapping[str, Any] | None, files: list[Weight] | None, build: Build) -> Model:
    """From the config and the tensors in the files; one of them is there."""
    held = stored.without_buffers(files or ())
    packed = quantized.find(said or {}, held)
    if packed is not None and said is None:
        raise ModelFileError(
            f"the projections of {name} are codes ({packed.format}), and tell no shapes: put its config.json "
            "beside, or name a folder of the model in 16 or 32 bits"
        )
    config = quantized.without(said or {})
    numbers = files is not None and packed is None
    dtype = _dtype(held, packed is not None) or read_dtype(config) or "F32"  # as transformers takes it
    try:
        built = _build(config, dtype, held if numbers else (), build if said is not None else unknown)
    except CannotBuildError as error:
        dimensions, remark = _dimensions(config)
        why = f" ({error})" if str(error) else ""
        if numbers:
            weights, by = stored.parameters(held, config), "headers of its files"
        else:
            weights, by = _told(config, dtype, error, packed), f"config.json, as a {config['model_type']}"
        return Model(name, weights, dimensions, by + why, remark, packed)
    dimensions, remark = _dimensions({**config, **built.config})
    return Model(name, built.weights, dimensions, built.by, remark, packed)


def _build(config: Mapping[str, Any], dtype: str, held: Sequence[Weight], build: Build) -> Architecture:
    """``held``: numbers in the files, which defaults must not contradict.

    Raises:
        CannotBuildError: as of ``build``.
        ModelFileError: a size is absurd.
    """
    sized = check_sizes(config)
    built = build(config, dtype)
    difference = _difference(built.weights, held)
    if difference and not sized:
        raise CannotBuildError(f"config.json names no sizes, and what {built.by} makes is another model")
    return built._replace(by=built.by + difference)


def _told(
    config: Mapping[str, Any], dtype: str, asked: CannotBuildError, packed: quantized.Quantized | None
) -> list[Weight]:
    """By the table of families.

    Raises:
        ModelFileError: not by that either; it says why nobody else could, and what can be done.
    """
    try:
        return weights_of(config, dtype)
    except UntoldError as error:
        missing = asked.library if isinstance(asked, MissingLibraryError) else ""
        why = [str(asked)]
        if error.known and (missing or not str(asked)):
            why.append(f"without {'it' if missing else 'transformers'} only {error.known} are known")
        if not check_sizes(config):
            why.append("config.json names no sizes")
        ways = [error.way, f"install {missing}" if missing else ""]
        if packed is None:
            ways.append("put its safetensors files beside it")
        ways = [*filter(None, ways), "give --params instead"]
        said = f" ({'; '.join(filter(None, why))})" if any(why) else ""
        raise ModelFileError(f"{error}{said}: {', or '.join(ways)}") from None


def _dimensions(config: Mapping[str, Any]) -> tuple[Dimensions | None, str]:
    """And what is to be said of them: the accounting is that of Llama's family."""
    found, remark = read_dimensions(config)
    kind = language_part(config).get("model_type")
    if found is None or kind is None or str(kind) in FAMILIES:
        return found, remark
    return found, ", ".join(filter(None, (f"as if a {kind!s:.40} were a Llama of its sizes", remark)))


def _dtype(held: Sequence[Weight], packed: bool) -> str | None:
    """That most of the floating point numbers have; beside codes, of more than 8 bits."""
    counts: dict[str, int] = {}
    for weight in held:
        if stored.is_floating(weight) and not (packed and weight.dtype.startswith("F8")):
            counts[weight.dtype] = counts.get(weight.dtype, 0) + weight.numel
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def _difference(built: Sequence[Weight], held: Sequence[Weight]) -> str:
    """What the files hold, where that is something else."""
    count = sum(weight.numel for weight in held if stored.is_floating(weight))
    if not count or count == sum(weight.numel for weight in built):
        return ""
    return f"; the files hold {count:,} numbers"
