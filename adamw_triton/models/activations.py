"""How much memory forward and backward take beside weights, gradients and state: an estimate.

Counted in what autograd keeps of a decoder of the Llama family as transformers runs it, with fused
attention; the accounting is that of Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198, section 4), whose 34 bytes are GPT-3's. Of one token, with ``s`` bytes
an element, ``h`` the hidden size, ``f`` the width of the feed-forward, ``q`` and ``k`` those of queries and
keys, ``V`` the vocabulary:

- a layer keeps ``(8 + 4s) h``: what two norms made of their input, in fp32 and in the model's dtype;
  ``2s q``: queries and the attention's output; ``2s k``: keys and values; ``4s f``: gate, its activation, up,
  their product; LoRA adds an fp32 copy of what goes into each adapted projection
- checkpointing keeps ``s h`` of a layer instead, and makes one layer at a time anew

The peak is in one of four places: at the loss, where ``12 V`` are logits in several forms; in backward of the
head; in that of a layer, with ``2s (f + h)`` of gradients inside it; or of the embeddings. Without
accumulation the weights' gradients are not there yet at the first two, and what they leave free is used
by the activations: that is taken off, for the plan counts gradients as always there. With gradient release
so it counts the few that are there at one time.

tests/models/test_activations.py measures it on real models, but for LoRA and 4-bit bases. On a GPU,
kernels' workspaces and the allocator's rounding come on top.
"""

from __future__ import annotations

from typing import NamedTuple

from adamw_triton.models import Dimensions


class Batch(NamedTuple):
    """What goes through the model at once."""

    sequences: int = 1
    length: int = 2048
    checkpointing: bool = True
    accumulating: bool = False
    """Gradients stay from one batch to the next."""
    released: bool = False
    """Gradients are used up while backward runs, or go to the host; of no use with ``accumulating``."""

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class Workload(NamedTuple):
    """What of the model is trained."""

    itemsize: int
    """Bytes of an element of its dtype."""
    gradients: int = 0
    """Bytes of the gradients of its own weights, those that are there at one time; 0 where they are
    frozen."""
    tied: bool = False
    """The embeddings are the head, too."""
    adapted_inputs: int = 0
    """Numbers that go into LoRA's projections, of one token, in all layers."""
    largest_quantized: int = 0
    """Elements of the largest projection that is held in 4 bits: it is made anew while it is used."""


def estimate(model: Dimensions, batch: Batch, workload: Workload) -> int:
    """Bytes at the peak, all gradients counted elsewhere."""
    size, tokens = workload.itemsize, batch.tokens
    layer = (8 + 4 * size) * model.hidden + 2 * size * (model.query_width + model.key_width)
    layer += 4 * size * model.intermediate + 4 * workload.adapted_inputs // model.layers
    inside = 2 * size * (model.intermediate + model.hidden)
    kept = size * model.hidden if batch.checkpointing else layer
    anew = layer if batch.checkpointing else 0

    all_kept = tokens * kept * model.layers
    at_loss = all_kept + tokens * (12 * model.vocabulary + (4 + 2 * size) * model.hidden)
    in_head = all_kept + tokens * (size * model.vocabulary + 5 * size * model.hidden)
    in_last_layer = all_kept + tokens * (anew + inside)
    in_first_layer = tokens * (kept + anew + inside)
    in_embeddings = tokens * size * model.hidden

    is_full = workload.gradients > 0
    embeddings = size * model.vocabulary * model.hidden * is_full
    projection = size * model.hidden * model.intermediate * is_full
    if batch.accumulating:
        # A new gradient lies beside the one that it is added to; that of tied embeddings is itself a sum.
        in_head += embeddings
        in_last_layer += projection
        in_embeddings += embeddings * (3 if workload.tied else 1)
        peak = max(at_loss, in_head, in_last_layer, in_embeddings)
    elif batch.released:
        # Few are there, at any time; at first none.
        in_embeddings += 2 * embeddings if workload.tied else 0
        peak = max(at_loss - workload.gradients, in_head, in_last_layer, in_embeddings)
    else:
        # At first no gradient is there, at last all: the embeddings' own, or if they are tied two more.
        before = max(at_loss, in_head + embeddings, in_last_layer) - workload.gradients
        in_first_layer -= 0 if workload.tied else embeddings
        in_embeddings += 2 * embeddings if workload.tied else 0
        peak = max(before, in_first_layer, in_embeddings)
    return peak + size * workload.largest_quantized


def counted(model: Dimensions, batch: Batch, workload: Workload) -> str:
    """What ``estimate`` counts, in words."""
    kept = f"what {model.layers} layers keep"
    if batch.checkpointing:
        kept = f"the inputs of {model.layers} layers, one layer made anew"
    line = f"counted are {kept}, and logits of {model.vocabulary:,} words"
    if workload.gradients and not batch.accumulating and not batch.released:
        line += ", less the room of the gradients, which come later"
    return line
