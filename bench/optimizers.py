"""The optimizers that are timed and trained with: ours and the peers' libraries, each as it is shipped.

(``bench.peers`` has the *formats*, formulas of CUDA kernels included, for what is about numbers alone.)
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.peers import Eager, Stepper

Build = Callable[[list[Tensor], float, float], Stepper]
"""(parameters, lr, weight_decay) -> an optimizer with betas (0.9, 0.999) and eps 1e-8."""
NEVER = 1 << 62
BETAS, EPS = (0.9, 0.999), 1e-8
PROBE = 1 << 14
"""Elements of the tensor that an optimizer has to step on to be compared."""


@dataclass(frozen=True)
class Optimizer:
    """One row of every comparison."""

    key: str
    build: Build
    library: str
    """Distribution that it comes in."""
    bits: int
    """Of each of m and v, an element; 32 also where state has the parameter's dtype."""
    paged: bool = False
    needs: str = ""
    """What it cannot do without and a machine may lack: said in words where it is lacking."""

    @property
    def ours(self) -> bool:
        return self.library == "adamw-triton"


def _torch(**how: Any) -> Build:
    return lambda params, lr, decay: torch.optim.AdamW(
        params, lr=lr, betas=BETAS, eps=EPS, weight_decay=decay, **how
    )


def ours(variant: str, **how: Any) -> Build:
    def build(params: list[Tensor], lr: float, decay: float) -> Stepper:
        import adamw_triton

        return adamw_triton.AdamW(params, lr, BETAS, EPS, decay, variant=variant, **how)

    return build


def _bitsandbytes(name: str) -> Build:
    def build(params: list[Tensor], lr: float, decay: float) -> Stepper:
        from bitsandbytes import optim

        return getattr(optim, name)(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=decay)

    return build


def _torchao(params: list[Tensor], lr: float, decay: float) -> Stepper:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # of each CUDA extension that is not there
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=torch.tensor(lr), betas=BETAS, eps=EPS, weight_decay=decay)


class Offloaded:
    """torchao's CPU offload. It takes gradients from hooks while backward makes them: where there was no
    backward, its step begins with autograd's handing them over."""

    def __init__(self, params: list[Tensor], lr: float, decay: float) -> None:
        from torchao.optim import CPUOffloadOptimizer

        how = {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": decay, "fused": True}
        self.params = params
        self.optimizer = CPUOffloadOptimizer(params, torch.optim.AdamW, **how)

    @property
    def state(self) -> Mapping[Any, Any]:
        parts = (part.state for part in (*self.optimizer.optim_dict.values(), self.optimizer.d_opt) if part)
        return {param: entry for state in parts for param, entry in state.items()}

    def step(self) -> None:
        if not self.optimizer.queue:
            hand_over(self.params)
        self.optimizer.step()


def hand_over(params: list[Tensor]) -> None:
    """Have autograd accumulate the gradients that are there, which calls the hooks of parameters."""
    given = [(param, param.grad) for param in params if param.grad is not None]
    for param, _ in given:
        param.grad = None
    torch.autograd.backward([param for param, _ in given], [grad for _, grad in given])


NO_LIMIT = 1e30
"""As a norm."""


class Clipped:
    """torch's fused AdamW after its ``clip_grad_norm_``."""

    def __init__(self, params: list[Tensor], lr: float, decay: float) -> None:
        self.params = params
        self.optimizer = _torch(fused=True)(params, lr, decay)
        self.state = self.optimizer.state

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, NO_LIMIT)
        self.optimizer.step()


MANAGED_SHARE = 0.5
"""Of the memory that a GPU has free: managed memory beyond that which is free can hang it."""
_managed = 0
"""Bytes asked for so far: bitsandbytes frees none."""


def _bitsandbytes_paged(name: str, bytes_per_element: int) -> Build:
    build = _bitsandbytes(name)

    def built(params: list[Tensor], lr: float, decay: float) -> Stepper:
        global _managed
        wanted = bytes_per_element * sum(p.numel() for p in params if p.numel() >= 100_000)  # others stay
        free = torch.cuda.mem_get_info()[0]
        if _managed + wanted > MANAGED_SHARE * free:
            raise torch.OutOfMemoryError(
                f"{wanted / 2**30:.1f} GiB of managed memory beside {_managed / 2**30:.1f} GiB, with "
                f"{free / 2**30:.1f} GiB free, were not asked for: it can hang the GPU"
            )
        _managed += wanted
        return build(params, lr, decay)

    return built


def _flashoptim(params: list[Tensor], lr: float, decay: float) -> Stepper:
    from flashoptim import FlashAdamW

    how = {"betas": BETAS, "eps": EPS, "weight_decay": decay, "master_weight_bits": None}
    return FlashAdamW(params, lr=lr, **how)


def _optimi(params: list[Tensor], lr: float, decay: float) -> Stepper:
    from optimi import AdamW

    return AdamW(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=decay)


_UVM = "managed memory, which only CUDA has"
_GPU = "a GPU"

OPTIMIZERS = (
    Optimizer("adamw_triton 32bit", ours("32bit"), "adamw-triton", 32),
    Optimizer("adamw_triton 8bit", ours("8bit"), "adamw-triton", 8),
    Optimizer("adamw_triton paged_32bit", ours("paged_32bit"), "adamw-triton", 32, paged=True),
    Optimizer("adamw_triton paged_8bit", ours("paged_8bit"), "adamw-triton", 8, paged=True),
    Optimizer("torch foreach", _torch(foreach=True), "torch", 32),
    Optimizer("torch fused", _torch(fused=True), "torch", 32),
    Optimizer("bitsandbytes 32-bit", _bitsandbytes("AdamW32bit"), "bitsandbytes", 32),
    Optimizer("bitsandbytes 8-bit", _bitsandbytes("AdamW8bit"), "bitsandbytes", 8),
    Optimizer(
        "bitsandbytes paged 32-bit", _bitsandbytes_paged("PagedAdamW32bit", 8), "bitsandbytes", 32, True, _UVM
    ),
    Optimizer(
        "bitsandbytes paged 8-bit", _bitsandbytes_paged("PagedAdamW8bit", 2), "bitsandbytes", 8, True, _UVM
    ),
    Optimizer("torchao 8-bit", _torchao, "torchao", 8),
    Optimizer("torchao CPU offload", Offloaded, "torchao", 32, True, _GPU),
    Optimizer("flashoptim 8-bit", _flashoptim, "flashoptim", 8, needs=_GPU),
    Optimizer("optimi", _optimi, "torch-optimi", 32),
)
RESIDENT = tuple(one for one in OPTIMIZERS if not one.paged)
EXACT = tuple(
    Optimizer(f"adamw_triton {bits}bit, exact", ours(f"{bits}bit", master_weights=True), "adamw-triton", bits)
    for bits in (32, 8)
)
"""Keep weights of 16 bits exactly; fp32 ones are as they are."""
RELEASED = tuple(
    Optimizer(
        f"adamw_triton paged_{bits}bit, released",
        ours(f"paged_{bits}bit", gradient_release=True),
        "adamw-triton",
        bits,
        paged=True,
    )
    for bits in (8, 32)
)
"""Step while backward runs, and free its gradients."""
CLIPPED = (
    Optimizer("adamw_triton 32bit, clipped", ours("32bit", max_grad_norm=NO_LIMIT), "adamw-triton", 32),
    Optimizer("adamw_triton 8bit, clipped", ours("8bit", max_grad_norm=NO_LIMIT), "adamw-triton", 8),
    Optimizer("torch fused, clipped", Clipped, "torch", 32),
)
"""The whole cost of clipping to a norm that no gradients have: these stay as they are for all."""


def runnable(
    optimizers: Iterable[Optimizer], device: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Optimizer], dict[str, str]]:
    """(those that really step here, why the others do not, by key)."""
    found, reasons = [], {}
    for optimizer in optimizers:
        reason = refusal(optimizer, device, dtype)
        if reason is None:
            found.append(optimizer)
        else:
            reasons[optimizer.key] = reason
    return found, reasons


def refusal(optimizer: Optimizer, device: str, dtype: torch.dtype) -> str | None:
    """Why this optimizer cannot be compared on this device; None if it steps. Ours has to."""
    if optimizer.needs and device == "cpu":
        return f"it needs {optimizer.needs}"
    param = torch.ones(PROBE, device=device, dtype=dtype).requires_grad_()
    try:
        # Compilers take seconds, and that is no answer.
        with torch.compiler.set_stance("force_eager"), compiled_after(NEVER):
            made = optimizer.build([param], 0.1, 0.0)
            torch.autograd.backward(param.sum())  # some take the gradient while it is made
            made.step()
    except Exception as error:  # a peer may fail in any way
        if optimizer.ours:
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if not (param < 1).all():
        return "its step leaves the parameter as it was"
    return None


def without_compiling(optimizer: Optimizer) -> Optimizer:
    """torchao compiles its update anew for every shape of parameter, minutes for a model: run eagerly it
    does the same. The others as they are."""
    if optimizer.library != "torchao":
        return optimizer
    return replace(optimizer, build=lambda params, lr, decay: Eager(optimizer.build(params, lr, decay)))


@contextlib.contextmanager
def told(optimizer: Optimizer, reasons: dict[str, str]) -> Iterator[None]:
    """What goes wrong within is the reason why it has no figures; ours may run out of memory, and no more."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        reasons[optimizer.key] = f"out of memory: {error}".splitlines()[0][:200]
    except Exception as error:  # a peer may fail in any way
        if optimizer.ours:
            raise
        reasons[optimizer.key] = f"{type(error).__name__}: {error}".splitlines()[0][:200]


def give_back(device: str) -> None:
    """What is no longer used, to the GPU, before the next optimizer comes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def compiled_after(elements: int) -> Iterator[None]:
    """When ours is compiled for CPU tensors: 0 is at the first step, so that warm-up has it; left alone, it
    is after 2**28 elements. The results are the same bits."""
    from adamw_triton_kernels import fusion

    patience, fusion.PATIENCE = fusion.PATIENCE, elements
    try:
        yield
    finally:
        fusion.PATIENCE = patience
