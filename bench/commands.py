"""What ``python -m bench`` can be asked for, and in which module each is."""

from __future__ import annotations

SUITES = {
    "step": "seconds of a step, beside a copy's bandwidth",
    "host": "what a step costs on the host, before any GPU work",
    "telemetry": "what statistics cost a step, beside the same numbers taken with torch",
    "paged": "steps whose state comes over the link, beside resident ones and the link itself",
    "memory": "peak of a step by place, beside what the plan says",
    "train": "a Llama trained: step time, memory, loss",
    "limit": "whole models fine-tuned where there is hardly room for their weights",
    "released": "gradients and state at one time, with release and without, beside the peers",
    "tokens": "what an optimizer adds to a training step, by the tokens of that step",
    "first": "seconds of a first step: compiled, and from Triton's cache",
    "convergence": "losses by seed, beside the noise of fp32 itself",
    "precision": "what 16-bit weights lose: nearest, stochastic and exact ones beside fp32's curve",
    "fidelity": "how closely each state format follows fp32 AdamW on the same gradients",
    "audit": "what the compiled kernels are made of: instructions, registers, memory access",
    "compiled": "the compiled kernels on an emulator of PTX, beside their specification",
    "hidden": "projected, not measured: what paged state adds to a step, by its tokens",
    "cards": "computed, not measured: which models can be fully fine-tuned on which card",
    "roofline": "projected, not measured: step times of GPUs from the audit",
}
PROOFS = {
    "gputests": "the tests that need a GPU",
    "sanitize": "compute-sanitizer over tests of the kernels",
    "tune": "the kernels at other sizes of their programs",
}
COMMANDS = {
    "prove": "on a GPU machine without network: tests, suites and goals in under ten minutes",
    "goals": "what must be shown on a GPU, beside the results there are",
    "wheels": "fetch the peers' wheels for a GPU machine without network",
    "readme": "write bench/README.md from the results there are",
}


PACKAGES = (
    "adamw_triton_kernels", "bitsandbytes", "flashoptim", "matplotlib", "numpy", "optimi", "rich", "torch",
    "torchao", "transformers",
)  # fmt: skip
"""What the extra "bench" of pyproject.toml brings, as it is imported."""


def usage() -> str:
    """The list of suites, for a terminal."""
    lines = [f"  {name:<12} {about}" for name, about in (SUITES | PROOFS | COMMANDS).items()]
    every = "       python -m bench --all | --quick [--out FOLDER]: every suite that can run here\n"
    return "\n".join(["usage: python -m bench SUITE [options; --help lists them]", every, *lines])


def home(name: str) -> str:
    """The module of a suite or command."""
    return f"bench.{name}" if name in COMMANDS else f"bench.suites.{name}"
