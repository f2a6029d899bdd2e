"""Models of which only the number of parameters is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from adamw_triton.models.config import Dimensions
from adamw_triton.models.model import Model
from adamw_triton.models.weights import Weight

VOCABULARY = 262_400
"""Gemma 3n's, the largest of the models that people fine-tune; Llama 3 has 128,256 words, Llama 2 32,000."""
SMALLEST = 3 * 10**8
"""Parameters; smaller models differ too much in their embeddings' share."""
LARGEST = 10**13

_WIDE = 2.8
"""Hidden size over the cube root of the parameters, at most: Command R+ has 2.6, Llama 3 8B 2.0."""
_DEEP, _DEEPER = 54, 0.155
"""Layers of 1e9 parameters, at most (MobileLLM 1B), and by which power of the parameters they grow: DeepSeek
67B has 95, Llama 3.1 405B 126."""
_GRAIN = 128


class _Shape(NamedTuple):
    hidden: int
    layers: int
    tied: bool


def sketches(parameters: int, dtype: str = "BF16") -> Sequence[Model]:
    """Decoders of Llama's kind with exactly so many parameters; below ``SMALLEST`` one without a shape.

    No one shape needs most whatever is trained of it, and how. So these are the extremes, between which
    models of that size are: as wide as any, or as deep; the embeddings tied to the head, or not.
    """
    if parameters < SMALLEST:
        weights = [Weight("weights", (parameters,), dtype)]
        counted = f"a guess; less than {SMALLEST:.0e} parameters tell no shape"
        return [
            Model(_name(parameters), weights, None, counted, "a number of parameters tells no dimensions")
        ]
    return [
        _model(parameters, shape(parameters, tied), dtype)
        for tied in (True, False)
        for shape in (_wide, _deep)
    ]


def _wide(parameters: int, tied: bool) -> _Shape:
    """With 12 h^2 weights a layer, of which a third is the attention's."""
    share = VOCABULARY * (1 if tied else 2)
    most = (0.65 if tied else 0.85) * parameters / share
    hidden = _grained(min(_WIDE * parameters ** (1 / 3), most))
    return _Shape(hidden, max(1, round((parameters - share * hidden) / (12 * hidden**2))), tied)


def _deep(parameters: int, tied: bool) -> _Shape:
    """h from parameters = 12 h^2 layers + h vocabulary."""
    share = VOCABULARY * (1 if tied else 2)
    layers = round(_DEEP * (parameters / 1e9) ** _DEEPER)
    hidden = ((share**2 + 48 * layers * parameters) ** 0.5 - share) / (24 * layers)
    return _Shape(_grained(hidden), layers, tied)


def _grained(hidden: float) -> int:
    return max(_GRAIN, int(hidden) // _GRAIN * _GRAIN)


def _model(parameters: int, shape: _Shape, dtype: str) -> Model:
    """The feed-forward is as wide as the number then wants."""
    hidden, layers, tied = shape
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, hidden)
    left = parameters - len(shapes) * VOCABULARY * hidden - 4 * hidden**2 * layers
    intermediate = left // (3 * hidden * layers)
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{letter}_proj.weight": (hidden, hidden) for letter in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
    weights = [Weight(name, shape, dtype) for name, shape in shapes.items()]
    weights.append(Weight("rest", (left - 3 * intermediate * hidden * layers,), dtype))
    words = f"{VOCABULARY:,} words{', tied to the head' if tied else ''}"
    counted = (
        f"a guess, {words}, {layers} layers of {hidden:,}; of the shapes that models of this size have, "
        "the one that takes most. Its config.json tells better"
    )
    dimensions = Dimensions(hidden, layers, VOCABULARY, intermediate, hidden, hidden)
    return Model(_name(parameters), weights, dimensions, counted)


def _name(parameters: int) -> str:
    return f"{parameters:.3g} parameters"
