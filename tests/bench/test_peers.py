"""The peers' formulas against values computed by hand, and against each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.peers import FLASH_CODECS, FORMATS, Codec, Format, FormulaAdamW, bitsandbytes_codec, state_bytes
from bench.suites.fidelity import Reference, Runner, bytes_per_parameter

BY_KEY = {format.key: format for format in FORMATS}
EXACT = Codec(1, lambda x: (x, x.new_empty(0)), lambda codes, scales: codes)


def block(values: list[float], size: int) -> Tensor:
    """One block that begins with ``values``; zeros after them."""
    return torch.nn.functional.pad(torch.tensor(values), (0, size - len(values)))[None]


def round_trip(codec: Codec, values: list[float]) -> tuple[list[int], list[float]]:
    codes, scales = codec.encode(block(values, codec.block))
    decoded = codec.decode(codes, scales)
    return codes[0, : len(values)].tolist(), decoded[0, : len(values)].tolist()


def test_flashoptim_m_is_a_softsign_code() -> None:
    # y = 2x/(1+|x|): 1, -2/3, 0.4; 127 y + 1/2: 127.5, -84.17, 51.3, and its floor.
    codes, decoded = round_trip(FLASH_CODECS[0], [1.0, -0.5, 0.25, 0.0])
    assert codes == [127, -85, 51, 0]
    # x = y/(2-|y|) with y = code/127: -85/169, 51/203
    assert decoded == pytest.approx([1.0, -85 / 169, 51 / 203, 0.0])


def test_flashoptim_v_is_linear_in_its_root() -> None:
    codes, decoded = round_trip(FLASH_CODECS[1], [1.0, 0.25, 1e-4, 0.0])
    assert codes == [255, 128, 3, 0]  # 255.5, 128.0, 3.05
    assert decoded == pytest.approx([1.0, (128 / 255) ** 2, (3 / 255) ** 2, 0.0])


def test_flashoptim_scales_have_the_range_of_fp16() -> None:
    assert round_trip(FLASH_CODECS[0], [1e-8])[1] == [0.0]
    assert round_trip(FLASH_CODECS[0], [1e5])[1] == [float("inf")]


def test_bitsandbytes_signed_map() -> None:
    pytest.importorskip("bitsandbytes")
    codec = bitsandbytes_codec(signed=True)
    # The top decade has 64 values, at the middles of 64 equal parts of [0.1, 1]; 1 and 0 stand apart.
    part = 0.9 / 64
    _, decoded = round_trip(codec, [2.0, 2 * (1 - 0.6 * part), -2 * (1 - 1.4 * part), 0.0])
    assert decoded == pytest.approx([2.0, 2 * (1 - part / 2), -2 * (1 - 1.5 * part), 0.0])


def test_bitsandbytes_keeps_the_sign_of_a_small_negative_m() -> None:
    pytest.importorskip("bitsandbytes")
    _, decoded = round_trip(bitsandbytes_codec(signed=True), [1.0, -1e-9, 1e-9])
    assert decoded == pytest.approx([1.0, -5.5e-7, 0.0])  # of 0.1..1 in 1e-6: one value, the middle


def test_bitsandbytes_v_vanishes_where_its_m_survives() -> None:
    pytest.importorskip("bitsandbytes")
    assert round_trip(bitsandbytes_codec(signed=False), [1.0, 9e-8])[1] == [1.0, 0.0]
    assert round_trip(bitsandbytes_codec(signed=True), [1.0, 3e-4])[1][1] == pytest.approx(3e-4, rel=0.2)


def test_an_all_zero_block_stays_zero() -> None:
    codecs = list(FLASH_CODECS)
    if pytest.importorskip("bitsandbytes"):
        codecs += [bitsandbytes_codec(signed=True), bitsandbytes_codec(signed=False)]
    for codec in codecs:
        assert round_trip(codec, [0.0, 0.0])[1] == [0.0, 0.0]


def test_bitsandbytes_formula_is_torchaos_update() -> None:
    """Two independent writings of one map: nearest values, blocks of 256; apart at ties and signs of 0."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    runners = [Runner(BY_KEY[key], [8192]) for key in ("bnb CUDA", "ao 8-bit")]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradient = torch.randn(8192, generator=generator)
        ours, theirs = (runner.update([gradient]) for runner in runners)
    assert torch.isclose(ours, theirs, rtol=1e-4).double().mean() > 0.995


def test_formula_with_exact_codes_is_adamw() -> None:
    p = torch.zeros(5, 7)
    optimizer = FormulaAdamW([p], 1e-3, (0.9, 0.999), 1e-8, (EXACT, EXACT), min_size=0)
    reference = Reference(35)
    expected = torch.zeros(35, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        p.grad = torch.randn(5, 7, generator=generator)
        optimizer.step()
        expected -= 1e-3 * reference.update(p.grad.flatten())
    torch.testing.assert_close(p.flatten().double(), expected, rtol=1e-5, atol=1e-9)


def test_a_partial_last_block_is_a_block_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, part = torch.zeros(64), torch.zeros(40)
    optimizers = [
        FormulaAdamW([p], 1e-3, (0.9, 0.999), 1e-8, FLASH_CODECS, min_size=0) for p in (whole, part)
    ]
    for _ in range(5):
        gradient = torch.randn(40, generator=generator)
        whole.grad, part.grad = torch.nn.functional.pad(gradient, (0, 24)), gradient
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole[:40], part)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("torch fp32", 8),
        ("ours 32", 8),
        ("ours 128", 2 + 4 / 128),
        ("ours 256", 2 + 4 / 256),
        ("flash", 2 + 4 / 32),
    ],
)
def test_bytes_per_parameter(key: str, expected: float) -> None:
    assert bytes_per_parameter(BY_KEY[key]) == expected


@pytest.mark.parametrize(("key", "library"), [("bnb CPU", "bitsandbytes"), ("bnb CUDA", "bitsandbytes"),
                                              ("ao 8-bit", "torchao"), ("ao fp8", "torchao")])  # fmt: skip
def test_bytes_per_parameter_of_blocks_of_256(key: str, library: str) -> None:
    pytest.importorskip(library)
    assert bytes_per_parameter(BY_KEY[key]) == 2 + 8 / 256


def test_small_tensors_keep_fp32_where_the_peer_keeps_them() -> None:
    pytest.importorskip("bitsandbytes")
    for key, expected in (("bnb CUDA", 8), ("flash", 2.125)):
        assert bytes_per_parameter(BY_KEY[key], size=2048) == expected


def test_state_bytes_leaves_out_step_counts_and_code_tables() -> None:
    p = torch.zeros(10)

    optimizer = SimpleNamespace(
        state={p: {"step": torch.zeros(()), "qmap1": torch.zeros(256), "m": torch.zeros(10), "note": "text"}}
    )
    assert state_bytes(optimizer) == 40


def test_keys_and_labels_are_unique() -> None:
    assert (
        len({format.key for format in FORMATS}) == len({format.label for format in FORMATS}) == len(FORMATS)
    )
    assert all(isinstance(format, Format) for format in FORMATS)
