"""The optimizers that are compared, each behind ``build(parameters, lr, betas, eps)``.

Libraries run themselves where they run on a CPU. Two peers do not: flashoptim's constructor wants a
CUDA device, and bitsandbytes' CPU backend quantizes differently from its CUDA kernel (it never yields
code 0). Their CUDA arithmetic is written out here in plain torch, and labelled "formula".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Betas = tuple[float, float]


class Stepper(Protocol):
    """What is needed of an optimizer: it steps on ``.grad`` and shows its state tensors."""

    state: Mapping[Any, Any]

    def step(self) -> Any:
        """Update the parameters in place."""


@dataclass(frozen=True)
class Format:
    """One row of the comparison."""

    key: str
    """Short name: a column title."""
    label: str
    build: Callable[[list[Tensor], float, Betas, float], Stepper]
    """(parameters, lr, betas, eps) -> an optimizer without weight decay."""
    ours: bool = False


# --- Bytes -------------------------------------------------------------------------------------------

# Step counts and code tables (1 KiB each, the same for every tensor) are not state of m and v.
_NOT_COUNTED = {"step", "qmap", "qmap1", "qmap2"}


def state_bytes(optimizer: Stepper) -> int:
    """Bytes of m and v with their scales, from the state tensors themselves."""
    return sum(_tensor_bytes(state.items()) for state in optimizer.state.values())


def _tensor_bytes(named: Iterable[tuple[str, Any]]) -> int:
    total = 0
    for name, value in named:
        if name in _NOT_COUNTED or not isinstance(value, Tensor):
            continue
        if hasattr(value, "__tensor_flatten__"):  # torchao: a tensor made of several
            parts, _ = value.__tensor_flatten__()
            total += _tensor_bytes((part, getattr(value, part)) for part in parts)
        else:
            total += value.numel() * value.element_size()
    return total


# --- Formulas ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """A block-wise code of one moment: fp32 [blocks, block] <-> codes, and one scale a block."""

    block: int
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor], Tensor]


class FormulaAdamW:
    """AdamW without weight decay in fp32, whose m and v rest in the given codes between steps.

    m = beta1 m + (1-beta1) g,  v = beta2 v + (1-beta2) g^2,
    p -= lr (m / (1-beta1^t)) / (sqrt(v / (1-beta2^t)) + eps), then m and v are encoded.
    Tensors of fewer than ``min_size`` elements keep m and v in fp32.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        lr: float,
        betas: Betas,
        eps: float,
        codecs: tuple[Codec, Codec],
        min_size: int,
    ) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.codecs = {p: codecs if p.numel() >= min_size else (_EXACT, _EXACT) for p in parameters}
        self.steps = 0
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for p, pair in self.codecs.items():
            self._store(p, [p.new_zeros(-(-p.numel() // codec.block), codec.block) for codec in pair])

    @torch.no_grad()
    def step(self) -> None:
        """One AdamW step on every parameter's ``.grad``."""
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for p, pair in self.codecs.items():
            m, v = self._load(p)
            g1, g2 = (_blocks(p.grad, codec.block) for codec in pair)
            m = beta1 * m + (1 - beta1) * g1
            v = beta2 * v + (1 - beta2) * g2 * g2
            update = (m / correction1).flatten() / ((v / correction2).sqrt().flatten() + self.eps)
            self.add(p, -self.lr * update[: p.numel()].view_as(p))
            self._store(p, [m, v])

    def add(self, p: Tensor, change: Tensor) -> None:
        """An fp32 change to a parameter."""
        p += change

    def _load(self, p: Tensor) -> list[Tensor]:
        state = self.state[p]
        return [
            codec.decode(state[f"{name}_codes"], state[f"{name}_scales"])
            for name, codec in zip("mv", self.codecs[p], strict=True)
        ]

    def _store(self, p: Tensor, moments: list[Tensor]) -> None:
        self.state[p] = {}
        for name, codec, moment in zip("mv", self.codecs[p], moments, strict=True):
            codes, scales = codec.encode(moment)
            self.state[p] |= {f"{name}_codes": codes, f"{name}_scales": scales}


def _blocks(x: Tensor, block: int) -> Tensor:
    """x as fp32 [blocks, block], the last block filled up with zeros."""
    flat = x.flatten().float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


_EXACT = Codec(1, lambda x: (x, x.new_empty(0)), lambda codes, scales: codes)


# flashoptim 0.1.4, _triton_adam_kernel. The scale is stored in fp16, the codes are made with it in fp32.
FLASH_BLOCK = 32


def _flash_scale(x: Tensor) -> Tensor:
    return x.abs().amax(1, keepdim=True).clamp(min=1e-12)


def _flash_encode_m(m: Tensor) -> tuple[Tensor, Tensor]:
    """code = floor(127 y + 1/2), y = 2x/(1+|x|) (softsign), x = m/scale."""
    scale = _flash_scale(m)
    x = m / scale
    code = torch.floor(127.0 * (2.0 * x / (1.0 + x.abs())) + 0.5)
    return code.to(torch.int8), scale.to(torch.float16)


def _flash_decode_m(codes: Tensor, scales: Tensor) -> Tensor:
    y = codes.float() / 127.0
    return y / (2.0 - y.abs()) * scales.float()


def _flash_encode_v(v: Tensor) -> tuple[Tensor, Tensor]:
    """code = floor(255 sqrt(v)/scale + 1/2)."""
    root = v.sqrt()
    scale = _flash_scale(root)
    return torch.floor(255.0 * root / scale + 0.5).to(torch.uint8), scale.to(torch.float16)


def _flash_decode_v(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes.float() / 255.0 * scales.float()).square()


FLASH_CODECS = (
    Codec(FLASH_BLOCK, _flash_encode_m, _flash_decode_m),
    Codec(FLASH_BLOCK, _flash_encode_v, _flash_decode_v),
)


# bitsandbytes 0.50, kOptimizerStatic8bit2StateBlockwise; Dettmers et al., arXiv:2110.02861.
BNB_BLOCK = 256


def bitsandbytes_codec(signed: bool) -> Codec:
    """The value of the dynamic map that is nearest to x/max|x|; a negative x keeps a negative code."""
    from bitsandbytes.functional import create_dynamic_map

    table = create_dynamic_map(signed=signed).float()
    midpoints = (table[1:] + table[:-1]) / 2

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(1, keepdim=True)
        # An all-zero block decodes to zeros whatever its codes: 1 only avoids 0/0.
        codes = torch.bucketize(x / torch.where(scale > 0, scale, 1.0), midpoints)
        # The kernel moves a code whose sign bit is not x's. 0 counts as positive, so of all x near 0
        # only the negative ones meet it.
        codes -= ((x < 0) & (table[codes] >= 0)).long()
        return codes.to(torch.uint8), scale

    return Codec(BNB_BLOCK, encode, lambda codes, scales: table[codes.int()] * scales)


# --- The table ---------------------------------------------------------------------------------------


def _torch_adamw(parameters: list[Tensor], lr: float, betas: Betas, eps: float) -> Stepper:
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=0.0)


def _ours(**options: Any) -> Callable[[list[Tensor], float, Betas, float], Stepper]:
    def build(parameters: list[Tensor], lr: float, betas: Betas, eps: float) -> Stepper:
        from adamw_triton import AdamW

        return AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=0.0, **options)

    return build


def _bitsandbytes_library(parameters: list[Tensor], lr: float, betas: Betas, eps: float) -> Stepper:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr, betas=betas, eps=eps, weight_decay=0.0)


def _bitsandbytes_formula(parameters: list[Tensor], lr: float, betas: Betas, eps: float) -> Stepper:
    codecs = (bitsandbytes_codec(signed=True), bitsandbytes_codec(signed=False))
    return FormulaAdamW(parameters, lr, betas, eps, codecs, min_size=4096)


def _flashoptim_formula(parameters: list[Tensor], lr: float, betas: Betas, eps: float) -> Stepper:
    return FormulaAdamW(parameters, lr, betas, eps, FLASH_CODECS, min_size=0)


class Eager:
    """torchao compiles its update, which takes minutes; run eagerly, the same functions do the same."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state = optimizer.state

    def step(self) -> None:
        with torch.compiler.set_stance("force_eager"):
            self.optimizer.step()


def _torchao(name: str) -> Callable[[list[Tensor], float, Betas, float], Stepper]:
    def build(parameters: list[Tensor], lr: float, betas: Betas, eps: float) -> Stepper:
        # It warns of each CUDA extension that this machine cannot load; none is used here.
        logging.getLogger("torchao").setLevel(logging.ERROR)
        import torchao.optim

        optimizer_class = getattr(torchao.optim, name)
        return Eager(optimizer_class(parameters, lr=torch.tensor(lr), betas=betas, eps=eps, weight_decay=0.0))

    return build


FORMATS = (
    Format("torch fp32", "torch.optim.AdamW (fp32)", _torch_adamw),
    Format("ours 32", "adamw_triton 32-bit", _ours(variant="32bit"), ours=True),
    Format("ours 128", "adamw_triton 8-bit, block 128", _ours(variant="8bit"), ours=True),
    Format("ours 256", "adamw_triton 8-bit, block 256", _ours(variant="8bit", block_size=256), ours=True),
    Format("bnb CPU", "bitsandbytes 8-bit (library, CPU)", _bitsandbytes_library),
    Format("bnb CUDA", "bitsandbytes 8-bit (CUDA formula)", _bitsandbytes_formula),
    Format("ao 8-bit", "torchao 8-bit (library, eager)", _torchao("AdamW8bit")),
    Format("ao fp8", "torchao fp8 (library, eager)", _torchao("AdamWFp8")),
    Format("flash", "flashoptim 8-bit (CUDA formula)", _flashoptim_formula),
)
