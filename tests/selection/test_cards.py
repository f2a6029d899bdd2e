"""Cards are found by the names that people and drivers use, and by no other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_triton.selection.cards import CARDS, GIB, Card, find_card

NAMES = {
    "T4": "T4",
    "tesla t4": "T4",
    "T4 16GB": "T4",
    "3090": "RTX 3090",
    "rtx3090": "RTX 3090",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "  rtx-4090 ": "RTX 4090",
    "4060ti": "RTX 4060 Ti 16GB",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "A100-80GB": "A100-80GB",
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA A100 80GB PCIe": "A100-80GB",
    "NVIDIA A100-PCIE-40GB": "A100-40GB",
    "Tesla V100-SXM2-16GB": "V100-16GB",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "H100": "H100 SXM",
    "H200 141GB": "H200",
    "NVIDIA GH200 480GB": "GH200 480GB",
    "gh200": "GH200 480GB",
    "AMD Instinct MI300X": "MI300X",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_names_that_people_and_drivers_use(name: str, expected: str) -> None:
    assert find_card(name).name == expected


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_is_found_by_its_own_name_however_it_is_spelled(card: Card) -> None:
    for name in (card.name, card.name.lower(), f"NVIDIA {card.name}", card.name.replace(" ", "-")):
        assert find_card(name) is card


UNKNOWN = {
    "T5": "unknown GPU 'T5': did you mean 'T4'?",
    "RTX 4900": "unknown GPU 'RTX 4900': did you mean 'RTX 4090',",
    "RTX 4090 Laptop GPU": "unknown GPU 'RTX 4090 Laptop GPU': did you mean 'RTX 4090'",
    "RTX 3080 12GB": "unknown GPU 'RTX 3080 12GB': did you mean 'RTX 3080'",
    "A100": "'A100' is several GPUs: say 'A100-40GB' or 'A100-80GB'",
    "V100": "'V100' is several GPUs: say 'V100-16GB' or 'V100-32GB'",
    "Voodoo": "unknown GPU 'Voodoo': known are T4, ",
    "": "unknown GPU '': known are T4, ",
    "24GiB": "unknown GPU '24GiB': known are T4, ",
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN.items())
def test_others_are_refused_with_the_nearest(name: str, message: str) -> None:
    """A laptop's chip, or another memory, is another card."""
    with pytest.raises(ValueError, match="GPU") as refusal:
        find_card(name)
    assert str(refusal.value).startswith(message)


@given(st.text(max_size=40))
def test_any_text_is_a_card_or_a_refusal_of_one_line(name: str) -> None:
    try:
        found: object = find_card(name)
    except ValueError as error:
        found = error
    assert found in CARDS or len(str(found).splitlines()) == 1


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_figures_are_possible(card: Card) -> None:
    """Bytes and bytes a second, not gigabytes; a link is slower than memory."""
    _, memory, bandwidth, link, flops, source = card
    assert 1e13 < flops < 1e16
    assert 7 * GIB < memory < 200 * GIB
    assert 2e11 < bandwidth < 8e12
    assert 5e9 < link < bandwidth / 10
    assert source
