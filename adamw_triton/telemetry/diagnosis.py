"""From the statistics of the last steps to a ``Report``: what stands out, the likely cause, what to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from adamw_triton.telemetry import gradients, updates
from adamw_triton.telemetry.observed import Observed
from adamw_triton.telemetry.report import Finding, Report
from adamw_triton.telemetry.seen import PATIENCE, Seen, Symptom, Test


@dataclass(frozen=True)
class Rule:
    """How one kind of finding is made."""

    test: Test
    title: str
    cause: str
    remedy: str
    leads_to: tuple[str, ...] = ()
    """Kinds that come of it: what of these begins no sooner is no finding of its own."""


# Those that matter most come first.
RULES = {
    "lr_high": Rule(
        updates.lr_high,
        "The learning rate is too high",
        "Within five steps, updates moved the weights as far as these are long, where by rule of thumb a "
        "step moves them by a thousandth; or weights have grown until decay alone holds them.",
        "A tenth to a hundredth of the lr, and a warm-up.",
        ("decay_strong", "exploding", "diverging", "nonfinite", "dead"),
    ),
    "exploding": Rule(
        gradients.exploding,
        "The gradients of a layer explode",
        "They are many times what they were, and those of the other tensors are not: the fault is there, or "
        "in what this layer is given.",
        "A lower lr in a group of its own, adaptive_clip=1.05, which holds each tensor to its own average; "
        "look for a missing normalization.",
        ("diverging", "nonfinite"),
    ),
    "diverging": Rule(
        gradients.diverging,
        "Training diverges",
        "Gradients stay far above what was usual: steps overshoot, and make the next ones larger.",
        "Go back to the last checkpoint before it with a lower lr; max_grad_norm=1.0, or adaptive_clip=1.05.",
        ("nonfinite",),
    ),
    "nonfinite": Rule(
        gradients.nonfinite,
        "Gradients are NaN or infinite",
        "A batch gave NaN or Inf while norms were as usual: a broken sample, a division or logarithm of "
        "zero, an overflow of 16 bits. What is not skipped makes weights NaN for good.",
        'nonfinite="skip", or "raise" to stop there; look at the batch of that step; go back to a checkpoint '
        "if the step was not skipped.",
    ),
    "ranks_differ": Rule(
        gradients.ranks_differ,
        "Ranks differ",
        "Gradients or weights of the same step are others on other ranks: gradients are not averaged "
        "(no_sync, a model that was not wrapped), or replicas began from other weights.",
        "Call backward on the wrapped model; broadcast the weights from one rank; the same lr on all.",
    ),
    "decay_strong": Rule(
        updates.decay_strong,
        "Weight decay is too strong",
        "It is the larger part of what updates take from the weights, in most of the tensors that decay: it "
        "pulls them to zero faster than gradients build them.",
        "weight_decay of 0.01 to 0.1: it is multiplied by lr, and not added to gradients as Adam's is.",
        ("lr_high", "dead", "diverging", "eps_floor"),
    ),
    "all_lost": Rule(
        updates.all_lost,
        "Every update is lost to rounding",
        "Weights of 16 bits stand still: updates are smaller than half of the last bit (bf16: 0.2% to 0.4% "
        "of a weight), and rounding to nearest undoes each.",
        "master_weights=True keeps weights exactly; stochastic_rounding=True costs no memory (bf16); a "
        "higher lr if update_ratio is far below 1e-3.",
        ("lost_updates", "lr_low"),
    ),
    "lost_updates": Rule(
        updates.lost_updates,
        "Most updates are lost to rounding",
        "The learning rate is too low for weights of 16 bits: most updates are smaller than half of the last "
        "bit (bf16: 0.2% to 0.4% of a weight), and rounding to nearest undoes them.",
        "master_weights=True keeps weights exactly; stochastic_rounding=True costs no memory (bf16); a "
        "higher lr if update_ratio is far below 1e-3.",
        ("lr_low",),
    ),
    "no_gradient": Rule(
        gradients.no_gradient,
        "All gradients are zero",
        "zero_grad(set_to_none=False) between backward and step, a loss that does not depend on the weights, "
        "or gradients too small for fp16.",
        "Zero gradients after the step; loss.requires_grad; a gradient scaler with fp16.",
        ("lr_low", "decay_strong", "eps_floor"),
    ),
    "eps_floor": Rule(
        updates.eps_floor,
        "Gradients are too small for eps",
        "The root of v is below eps in most of the weights: eps is what gradients are divided by, and steps "
        "shrink with them.",
        "eps=1e-12; do not divide the loss by more than the batch.",
        ("lr_low", "lost_updates", "all_lost"),
    ),
    "lr_low": Rule(
        updates.lr_low,
        "The learning rate is too low",
        "Updates are a ten-millionth of the weights or less; by rule of thumb a step moves them by a "
        "thousandth.",
        "A higher lr; look at what the scheduler has made of it.",
    ),
    "dead": Rule(
        gradients.dead,
        "Tensors are dead",
        "Their gradient is exactly zero while others train: units that no input activates (ReLU), a branch "
        "multiplied by zero, values that are clamped.",
        "Look at the layer's activations; a lower lr or another initialization, GELU or leaky ReLU.",
    ),
    "frozen": Rule(
        gradients.frozen,
        "Tensors do not train though their neighbours do",
        "They have no gradient: requires_grad is False, or the loss does not depend on them (detach, "
        "no_grad, a layer that is not called).",
        "requires_grad_(True); if it is meant, leave them out of the optimizer.",
    ),
    "code_floor": Rule(
        updates.code_floor,
        "8-bit state is too coarse for v",
        "Half of its codes are the lowest: within blocks v spans more than codes do, and small elements are "
        "taken for larger, so that they hardly move; or most units get no gradient.",
        'A group of these with "state_bits": 32, or block_size=128.',
    ),
    "decay_off": Rule(
        updates.decay_off,
        "Weight decay is off where others have it",
        "Most tensors of that name in other layers decay, and these do not: they slipped into the group "
        "without.",
        "adamw_triton.param_groups(model) tells by structure what is to decay.",
    ),
}
KINDS = tuple(RULES)
SLACK = 5
"""Steps by which a cause may show later than what comes of it, as their limits differ."""


def diagnose(
    history: Sequence[Observed],
    *,
    names: Mapping[str, str] | None = None,
    ranks: Sequence[Observed] | None = None,
) -> Report:
    """
    Args:
        history: the last steps that were looked at, ``HISTORY`` of them at most, in their order.
        names: what to call tensors, by the names they were told by.
        ranks: the newest step that all ranks have, as each has seen it; None: ranks are not compared.
    """
    history = [_renamed(step, names) for step in history] if names else history
    seen = Seen(history, ranks)
    shown = {kind: found for kind, rule in RULES.items() if (found := rule.test(seen))}
    made = {kind: _finding(RULES[kind], kind, symptom) for kind, symptom in shown.items()}
    causes = _causes(shown)
    findings = [
        replace(finding, led_to=tuple(made[effect] for effect in causes if _root(effect, causes) == kind))
        for kind, finding in made.items()
        if kind not in causes
    ]
    return Report(tuple(findings), tuple(step.step for step in seen.steps), tuple(_notes(seen, findings)))


def of_all_ranks(history: Sequence[Observed]) -> list[Observed]:
    """The newest step that all ranks of the default process group have, as each has seen it, if there is one.
    All of them have to ask."""
    mine = {step.step: step for step in history}
    known: list[list[int]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(known, list(mine))
    common = set.intersection(*map(set, known))
    if not common:
        return []
    found: list[Observed] = [mine[max(common)]] * len(known)
    torch.distributed.all_gather_object(found, mine[max(common)])
    return found


def _finding(rule: Rule, kind: str, symptom: Symptom) -> Finding:
    return Finding(kind, rule.title, symptom.step, symptom.tensors, symptom.numbers, rule.cause, rule.remedy)


def _causes(shown: Mapping[str, Symptom]) -> dict[str, str]:
    """Of each kind that comes of another one, which."""
    causes: dict[str, str] = {}
    for kind, symptom in shown.items():
        for effect in RULES[kind].leads_to:
            later = effect in shown and symptom.step <= shown[effect].step + SLACK
            if later and kind not in causes:
                causes.setdefault(effect, kind)
    return causes


def _root(kind: str, causes: Mapping[str, str]) -> str:
    while kind in causes:
        kind = causes[kind]
    return kind


def _renamed(step: Observed, names: Mapping[str, str]) -> Observed:
    tensors = tuple(told._replace(name=names.get(told.name, told.name)) for told in step.tensors)
    return replace(step, tensors=tensors, idle=tuple(names.get(name, name) for name in step.idle))


def _notes(seen: Seen, findings: Sequence[Finding]) -> Iterator[str]:
    if 0 < len(seen.steps) < PATIENCE:
        yield f"Most of what can be wrong takes {PATIENCE} steps to show."
    if seen.ranks is not None and not seen.ranks:
        yield "Ranks were not compared: they have no step in common that all have looked at."
    idle = set(seen.steps[-1].idle) if seen.steps else set()
    if idle := idle.difference(seen.clean.names, *(finding.tensors for finding in findings)):
        yield f"Parameters without a gradient in any of these steps, as if frozen: {len(idle)}."
