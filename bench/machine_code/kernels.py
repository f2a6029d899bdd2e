"""What the audit compiles: our kernels and a peer's, each as the compiler is told of it at a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import triton.language as tl
from flashoptim import optimizers as flashoptim  # type: ignore[import-untyped]

from adamw_triton_kernels import adamw_8bit, adamw_32bit
from adamw_triton_kernels.work import MASTER, REMAINDER, STOCHASTIC

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Source(Protocol):
    """All that the compiler is told of one launch; `adamw_triton_kernels.launch.Build` is one."""

    @property
    def fn(self) -> Any: ...
    @property
    def signature(self) -> Mapping[str, str]: ...
    @property
    def constexprs(self) -> Mapping[str, Any]: ...
    @property
    def attrs(self) -> Mapping[tuple[int, ...], list[list[Any]]]: ...
    def options(self, warp_size: int) -> dict[str, Any]: ...
    @property
    def tile(self) -> int: ...


@dataclass(frozen=True)
class Kernel:
    """A kernel to audit."""

    build: Callable[..., Source]  # of the dtypes of parameters and gradients
    state: tuple[torch.dtype, ...]  # what it reads and writes for every element beside the parameter
    goal: float | None = None  # instructions per element at most, 16-bit on sm_90; None: see `beside`
    params: tuple[str, ...] = tuple(DTYPES)  # parameter types it has
    beside: str = ""  # the kernel than which it may have at most `more` instructions more; without, a peer
    more: int = 0
    scales: float = 0.0  # bytes that it reads and writes of state that elements share, to each

    @property
    def judged(self) -> bool:
        """Whether it is ours."""
        return self.goal is not None or bool(self.beside)

    def moves(self, param: torch.dtype, grad: torch.dtype) -> float:
        """Bytes that it has to load and store for an element."""
        kept = sum(dtype.itemsize for dtype in self.state) + self.scales
        return 2 * param.itemsize + grad.itemsize + 2 * kept


@dataclass(frozen=True)
class _Launch:
    """A peer's launch as a `Source`."""

    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]]
    tile: int

    def options(self, warp_size: int) -> dict[str, Any]:
        """As flashoptim leaves them: Triton's default of 4 warps, and of contraction, which 3.10 changes."""
        return {"num_warps": 4}


def _flashoptim(param: torch.dtype, grad: torch.dtype, correction: bool) -> Source:
    """flashoptim's 8-bit Adam as its `_fused_adam_step` launches it, for a length that 16 divides."""
    fn = flashoptim._triton_adam_kernel
    types = {
        "mom_ptr": "*i8",
        "mom_scales_f16_ptr": "*fp16",
        "var_ptr": "*u8",
        "var_scales_f16_ptr": "*fp16",
        "param_ptr": _POINTERS[param],
        "grad_ptr": _POINTERS[grad],
        "ecc_ptr": "*i8" if correction else _POINTERS[param],
        "N": "i32",
        "step": "i32",
        **dict.fromkeys(("lr", "beta1", "beta2", "eps", "weight_decay"), "fp32"),
    }
    constexprs = {
        "GROUP_SIZE": 32,
        "DECOUPLED_WEIGHT_DECAY": True,
        "PARAM_DTYPE": _TL_DTYPES[param],
        "USE_ECC": correction,
        "QUANTIZE_OPTIM_STATES": True,
        "SIGNED_ERROR_T": tl.int8,
        "NUM_MANTISSA_BITS": {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[param],
        "SIGNED_MAX_VAL": 127,
        "BLOCK_SIZE_N": 1024,
    }
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name == "N"]
    attrs: dict[tuple[int, ...], list[list[Any]]] = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return _Launch(fn, signature, constexprs, attrs, tile=1024)


MORE = 8
"""Instructions an element that it may cost to keep weights otherwise than to nearest."""
TOLD = 12
"""Instructions an element that statistics may cost."""
_FP32 = torch.float32
_CODES = (torch.int8, torch.uint8)

_NEAREST = {
    "32bit": Kernel(adamw_32bit.build, (_FP32, _FP32), goal=28),
    "32bit amsgrad": Kernel(partial(adamw_32bit.build, AMSGRAD=True), (_FP32, _FP32, _FP32), goal=28),
    "8bit block 128": Kernel(partial(adamw_8bit.build, BLOCK=128), _CODES, goal=60, scales=4 / 128),
    "8bit block 256": Kernel(partial(adamw_8bit.build, BLOCK=256), _CODES, goal=60, scales=4 / 256),
}
_OTHERWISE: tuple[tuple[str, str, tuple[torch.dtype, ...]], ...] = (
    (STOCHASTIC, "bf16", ()),
    (REMAINDER, "bf16", (torch.int16,)),
    (MASTER, "fp16", (_FP32,)),
)


def _otherwise() -> Iterator[tuple[str, Kernel]]:
    for name, kernel in _NEAREST.items():
        for weights, param, kept in _OTHERWISE:
            build = partial(kernel.build, WEIGHTS=weights)
            made = Kernel(build, (*kernel.state, *kept), None, (param,), name, MORE, kernel.scales)
            yield f"{name} {weights}", made


def _telling() -> Iterator[tuple[str, Kernel]]:
    """Those that leave statistics."""
    for name, kernel in _NEAREST.items():
        yield (
            f"{name} telling",
            replace(kernel, build=partial(kernel.build, TELLS=True), goal=None, beside=name, more=TOLD),
        )


KERNELS: dict[str, Kernel] = {
    **_NEAREST,
    **dict(_otherwise()),
    **dict(_telling()),
    "flashoptim 8bit": Kernel(partial(_flashoptim, correction=False), _CODES, scales=4 / 32),
    "flashoptim 8bit corrected": Kernel(
        partial(_flashoptim, correction=True), (*_CODES, torch.int8), params=("bf16", "fp16"), scales=4 / 32
    ),
}
