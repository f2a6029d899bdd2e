"""Bandwidths: of the table, guessed, or measured."""

from __future__ import annotations

import pytest
import torch

from adamw_triton.selection import rates
from adamw_triton.selection.cards import find_card

CUDA = torch.device("cuda", 0)


def test_a_card_of_the_table() -> None:
    card = find_card("T4")
    assert rates.named("NVIDIA T4") == (card.bandwidth, card.link, "known of the T4")


def test_a_card_of_no_table_is_a_guess_and_called_so() -> None:
    assert rates.named("Voodoo 2") == rates.UNKNOWN
    assert "guess" in rates.UNKNOWN.source


def test_what_was_measured_goes_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    monkeypatch.setattr(rates, "_found", {})
    assert rates.known(CUDA).source == "known of the T4"
    found = rates.Rates(1.0, 2.0, "measured")
    monkeypatch.setattr(rates, "measure", lambda device, size: found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    assert rates.measured(CUDA) is found
    assert rates.known(CUDA) is found


def test_where_hardly_any_memory_is_free_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By copies of 4 MiB, an H100 once had a twentieth of its bandwidth."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 20, 1 << 40))
    monkeypatch.setattr(rates, "_found", {})
    assert rates.measured(CUDA).source == "known of the T4"
    assert rates._found == {}


def test_the_hosts_own_copies_can_be_measured() -> None:
    """The same code as on a GPU, whose streams are the host here."""
    found = rates.measure(torch.device("cpu"), 1 << 22)
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.link < 1e13
    assert found.source == "measured"


@pytest.mark.gpu
@pytest.mark.alone
def test_a_gpus_memory_is_faster_than_its_link() -> None:
    found = rates.measured(CUDA)
    assert found.bandwidth > 2 * found.link > 0
