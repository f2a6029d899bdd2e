"""``param_groups()``: which parameters decay, and how fast each layer learns."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adamw_triton.arguments import as_number
from adamw_triton.tensors import is_flattened

_NORM = re.compile(r"Norm(\dd|Gated)?$")
_EMBEDDING = re.compile(r"Embeddings?(Bag)?$")
_EMBEDDED = re.compile(r"embed|tokens?$")
"""In the name of a parameter that a model holds itself: pos_embed, position_embeddings, cls_token."""


class _Place(NamedTuple):
    """Where a parameter is. A tied one has several."""

    name: str
    """Dotted, as ``named_parameters()`` has it."""
    owner: nn.Module
    param: Tensor

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def _is_bias(place: _Place) -> bool:
    return "bias" in place.leaf


def _is_norm(place: _Place) -> bool:
    return any(_NORM.search(cls.__name__) for cls in type(place.owner).__mro__)


def _is_embedding(place: _Place) -> bool:
    named = any(_EMBEDDING.search(cls.__name__) for cls in type(place.owner).__mro__)
    return named or _EMBEDDED.search(place.leaf) is not None


def _is_vector(place: _Place) -> bool:
    return not is_lazy(place.param) and place.param.ndim < 2


_KINDS: Mapping[str, Callable[[_Place], bool]] = {
    "biases": _is_bias,
    "norms": _is_norm,
    "embeddings": _is_embedding,
    "vectors": _is_vector,
}


def param_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    lr: float | Tensor | None = None,
    layer_decay: float | None = None,
    no_decay: Iterable[str] = ("biases", "norms", "embeddings", "vectors"),
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`AdamW`, or any other optimizer.

    Every parameter that requires gradients is in one group, once. Frozen ones are left out, as transformers'
    Trainer leaves them out. A tied one goes by the most careful of its places: no decay if any of them has
    none, and the lowest of their learning rates.

    Layers are found by structure: a *stack* is an nn.ModuleList (or an nn.ModuleDict with numbers for keys)
    of blocks, or an nn.Sequential in which a class of blocks comes twice, and that is in no other stack. A
    block is a module made of modules; in a model without such stacks, single modules will do. Stacks side by
    side in one module follow each other (layer1, layer2 ... of a ResNet); others (an encoder and a decoder, a
    vision tower) are counted each from its own top. Outside of stacks, embeddings have depth 0, and so has
    what is registered before a stack of the innermost module around it that has one; all else is the head,
    final norms too.

    For a schedule of the weight decay, before each step (groups that come to 0 stay there)::

        for group in (group for group in optimizer.param_groups if group["weight_decay"]):
            group["weight_decay"] = 0.1 * (1 - step / steps)

    Args:
        model: of any architecture.
        weight_decay: of what decays; None: the optimizer's.
        lr: of the head, or of all without ``layer_decay``; None: the optimizer's. If it is a tensor, each
            group gets one of its own.
        layer_decay: above 0 and at most 1, and needs ``lr``. The top layer learns with this times ``lr``,
            each one below with this times the rate of the one above it, the embeddings slowest: with ``lr *
            layer_decay ** (layers + 1)``, by the tallest stack. Where there is no head, the top layer has
            ``lr``.
        no_decay: what does not decay; it replaces the default. Kinds, and patterns for dotted names as in
            :mod:`fnmatch`: ``("biases", "norms", "vectors", "model.embed_tokens.*")``. Kinds are "biases" (by
            name), "norms" (by class: torch's, and any called ...Norm), "embeddings" (nn.Embedding, any class
            called ...Embedding or ...Embeddings, parameters called ...embed... or ...token) and "vectors"
            (fewer than two dimensions).

    Returns:
        A group for each depth and decay, the lowest depth first, and those that decay before those that do
        not. Each has ``params``, their ``param_names``, ``lr`` and ``weight_decay`` where these are not left
        to the optimizer, and with ``layer_decay`` its ``depth``: 0 the lowest, embeddings if there are any.

    Raises:
        TypeError: an argument is none of the above.
        ValueError: a number is out of range; a pattern matches no parameter; ``layer_decay`` comes without
            ``lr``, or there are no layers; nothing requires gradients.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, whose structure tells the layers, got {model!r:.60}")
    _check_numbers(weight_decay, lr, layer_decay)
    if any(map(is_flattened, model.parameters())):
        raise ValueError(
            "FSDP (version 1) has flattened the parameters of model, and every one is a vector now: call "
            "param_groups() before it is wrapped, with use_orig_params=True"
        )
    places = [
        _Place(f"{path}.{name}".lstrip("."), module, param)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    spared = _spared(places, no_decay)
    heights = {} if layer_decay is None else _heights(model, places, layer_decay)
    bottom = max(heights.values(), default=0)

    of_param: dict[Tensor, list[_Place]] = {}
    for place in places:
        if place.param.requires_grad:
            of_param.setdefault(place.param, []).append(place)
    if not of_param:
        raise ValueError(f"{type(model).__name__} has no parameter that requires gradients")
    members: dict[tuple[int, bool], dict[str, Tensor]] = {}
    for param, found in of_param.items():
        names = [place.name for place in found]
        depth = bottom - max(heights.get(name, 0) for name in names)
        members.setdefault((depth, not spared.isdisjoint(names)), {})[names[0]] = param

    groups = []
    for (depth, without), named in sorted(members.items(), key=lambda item: item[0]):
        group: dict[str, Any] = {"params": list(named.values()), "param_names": list(named)}
        if lr is not None:
            group["lr"] = lr * (1.0 if layer_decay is None else layer_decay ** (bottom - depth))
        decay = 0.0 if without else weight_decay
        if decay is not None:
            group["weight_decay"] = float(decay)
        if layer_decay is not None:
            group["depth"] = depth
        groups.append(group)
    return groups


def _check_numbers(weight_decay: object, lr: object, layer_decay: object) -> None:
    rate = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
    for name, value in (("weight_decay", weight_decay), ("lr", rate), ("layer_decay", layer_decay)):
        if value is None:
            continue
        allowed = "above 0 and at most 1" if name == "layer_decay" else "finite and >= 0"
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number {allowed}, or None, got {value!r:.60}")
        number = as_number(value)
        if number is None or not (0 < number <= 1 if name == "layer_decay" else 0 <= number < math.inf):
            raise ValueError(f"Invalid {name}: {value}; it must be {allowed}")
    if layer_decay is not None and lr is None:
        raise ValueError(f"layer_decay={layer_decay} needs lr, from which the learning rates of layers fall")


def _spared(places: list[_Place], no_decay: Iterable[str]) -> set[str]:
    """The names of what does not decay."""
    if isinstance(no_decay, str) or not isinstance(no_decay, Iterable):
        raise TypeError(f"no_decay must be a sequence of kinds and patterns, got {no_decay!r:.60}")
    spared: set[str] = set()
    for item in no_decay:
        if not isinstance(item, str):
            raise TypeError(f"no_decay must have strings, got {item!r:.60}")
        if item in _KINDS:
            spared |= {place.name for place in places if _KINDS[item](place)}
            continue
        matched = {place.name for place in places if fnmatchcase(place.name, item)}
        if not matched:
            raise ValueError(
                f"no_decay: {item!r} is no kind ({', '.join(map(repr, _KINDS))}), and as a pattern it "
                f"matches no parameter; names are like {', '.join(repr(place.name) for place in places[:2])}"
            )
        spared |= matched
    return spared


def _heights(model: nn.Module, places: list[_Place], layer_decay: float) -> dict[str, int]:
    """How far below the top each parameter is, by name."""
    stacks = list(_stacks({"": model}, _is_block)) or list(_stacks({"": model}, _has_parameters))
    if not stacks:
        raise ValueError(
            f"layer_decay={layer_decay} needs layers, and {type(model).__name__} has no nn.ModuleList or "
            "nn.Sequential of several modules"
        )
    layers = {path: len(stack) - index for stack in stacks for index, path in enumerate(stack)}
    bottom = max(layers.values()) + 1
    order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    last: dict[str, int] = {}  # where the last layer within a module is registered
    for path in layers:
        for above in _above(path):
            last[above] = max(last.get(above, 0), order[path])
    heights = {}
    for place in places:
        around = list(_above(place.name))
        layer = next((path for path in around if path in layers), None)
        if layer is not None:
            heights[place.name] = layers[layer]
            continue
        holder = next(path for path in around if path in last)
        # Of parameters that the holder has itself, nothing tells the order; but embeddings come first.
        first = _is_embedding(place) or (around[0] != holder and order[around[0]] < last[holder])
        heights[place.name] = bottom if first else 0
    top = min(heights.values())
    return {name: height - top for name, height in heights.items()}


def _stacks(modules: Mapping[str, nn.Module], is_layer: Callable[[nn.Module], bool]) -> Iterator[list[str]]:
    """The paths of the layers of each stack, the lowest first. Only outermost stacks: a layer may have a list
    of experts that is longer."""
    here: list[str] = []
    for path, module in modules.items():
        inner = {f"{path}.{name}".lstrip("."): child for name, child in _children(module).items()}
        if _is_stack(module, is_layer):
            here += [path for path, child in inner.items() if _has_parameters(child)]
        else:
            yield from _stacks(inner, is_layer)
    if here:
        yield here


def _is_stack(module: nn.Module, is_layer: Callable[[nn.Module], bool]) -> bool:
    layers = [type(child) for child in _children(module).values() if is_layer(child)]
    if isinstance(
        module, nn.Sequential
    ):  # which may be a whole model and its head: sentence-transformers' is
        return max(Counter(layers).values(), default=0) > 1
    numbered = isinstance(module, nn.ModuleDict) and all(name.isdigit() for name in module)
    return (numbered or isinstance(module, nn.ModuleList)) and bool(layers)


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """``named_children()``, which leaves out what comes again."""
    return {name: child for name, child in module._modules.items() if child is not None}


def _is_block(module: nn.Module) -> bool:
    return _has_parameters(module) and next(module.children(), None) is not None


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _above(path: str) -> Iterator[str]:
    """The modules around it, the innermost first, the model last."""
    while path:
        path = path.rpartition(".")[0]
        yield path
