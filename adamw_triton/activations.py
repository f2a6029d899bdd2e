"""How much memory forward and backward take beside weights, gradients and state: an estimate.

Counted in what autograd keeps of a decoder layer of the Llama family as transformers runs it, with
fused attention; the accounting is that of Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models" (arXiv 2205.05198, section 4), whose 34 bytes are GPT-3's. Of one token, with
``s`` bytes an element, ``h`` the hidden size, ``f`` the width of the feed-forward, ``q`` and ``k`` those of
queries and keys, ``V`` the vocabulary:

- a layer keeps ``(8 + 4s) h``: what two norms made of their input, in fp32 and in the model's dtype;
  ``2s q``: queries and the attention's output; ``2s k``: keys and values; ``4s f``: gate, its activation, up,
  their product
- checkpointing keeps ``s h`` of a layer instead, and makes one layer at a time anew
- gradients inside the layer that is in backward: ``2s (f + h)``
- the loss, before any layer is in backward: ``12 V`` of logits in several forms, ``(4 + 2s) h`` of the last
  norm
- LoRA keeps an fp32 copy of what goes into each adapted projection
- a 4-bit base is made anew in the model's dtype one projection at a time

tests/activations measures it on real models, but for the last two: within 5%. On a GPU, kernels' workspaces
and the allocator's rounding come on top.
"""

from __future__ import annotations

from typing import NamedTuple

from adamw_triton.model_files import Dimensions


class Batch(NamedTuple):
    """What goes through the model at once."""

    sequences: int = 1
    length: int = 2048
    checkpointing: bool = True

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def estimate(
    model: Dimensions, batch: Batch, itemsize: int, *, adapted_inputs: int = 0, largest_quantized: int = 0
) -> int:
    """Bytes at the peak.

    Args:
        itemsize: bytes of an element of the model's dtype.
        adapted_inputs: how many numbers go into LoRA's projections, of one token, in all layers.
        largest_quantized: elements of the largest projection that is held in 4 bits.
    """
    norms = (8 + 4 * itemsize) * model.hidden
    attention = 2 * itemsize * (model.query_width + model.key_width)
    feed_forward = 4 * itemsize * model.intermediate
    layer = norms + attention + feed_forward + 4 * adapted_inputs // model.layers
    in_backward = 2 * itemsize * (model.intermediate + model.hidden)
    loss = 12 * model.vocabulary + (4 + 2 * itemsize) * model.hidden
    if batch.checkpointing:
        kept, most = itemsize * model.hidden * model.layers, max(loss, layer + in_backward)
    else:
        kept, most = layer * model.layers, max(loss, in_backward)
    return batch.tokens * (kept + most) + itemsize * largest_quantized
