"""A model of which only the number of parameters is known."""

from __future__ import annotations

from adamw_triton.models.config import Dimensions
from adamw_triton.models.model import Model
from adamw_triton.models.weights import Weight

ASPECT = 128
"""Hidden size over number of layers; Llama 7B, 13B and 70B have 128, 128 and 102."""
VOCABULARY = 32_000
SMALLEST = 3 * 10**8
"""Parameters; smaller models differ too much in their embeddings' share."""
LARGEST = 10**13


def sketch(parameters: int, dtype: str = "BF16") -> Model:
    """A decoder of Llama's shape with exactly so many parameters; below ``SMALLEST`` without a shape.

    With 12 h^2 weights a layer and h = 128 layers: the number of layers is the cube root of
    parameters / (12 * 128^2). The feed-forward is as wide as the number then wants.
    """
    name = f"{parameters:.3g} parameters"
    if parameters < SMALLEST:
        return Model(name, [Weight("weights", (parameters,), dtype)], None)
    layers = max(1, round((parameters / (12 * ASPECT**2)) ** (1 / 3)))
    hidden = ASPECT * layers
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    left = parameters - 2 * VOCABULARY * hidden - 4 * hidden**2 * layers
    intermediate = left // (3 * hidden * layers)
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{letter}_proj.weight": (hidden, hidden) for letter in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
    weights = [Weight(name, shape, dtype) for name, shape in shapes.items()]
    weights.append(Weight("rest", (left - 3 * intermediate * hidden * layers,), dtype))
    return Model(name, weights, Dimensions(hidden, layers, VOCABULARY, intermediate, hidden, hidden))
