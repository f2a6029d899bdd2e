"""The demo's text and the batches cut from it."""

from itertools import islice

import pytest
import torch

from adamw_triton.demo import DemoError
from adamw_triton.demo.corpus import Batches, load_corpus, split


def test_standard_library_is_read_the_same_way_twice_and_capped():
    first, second = load_corpus(max_bytes=300_000), load_corpus(max_bytes=300_000)
    assert first.dtype == torch.uint8
    assert first.shape == (300_000,)
    assert torch.equal(first, second)
    assert b"import sys\n" in bytes(first.tolist())


def test_files_are_joined_in_sorted_order_without_tests_and_installed_packages(tmp_path):
    for name in ("b.py", "a/z.py", "a/test/x.py", "site-packages/y.py", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    assert bytes(load_corpus(root=tmp_path).tolist()) == b"# a/z.py\n# b.py\n"


def test_a_folder_above_the_library_may_be_called_test(tmp_path):
    root = tmp_path / "test" / "lib"
    root.mkdir(parents=True)
    (root / "a.py").write_text("x = 1\n")
    assert len(load_corpus(root=root)) == 6


def test_no_sources_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(DemoError, match=str(tmp_path)):
        load_corpus(root=tmp_path)


def test_split_cuts_without_overlap_or_loss():
    corpus = torch.arange(200, dtype=torch.uint8)
    train, validation = split(corpus)
    assert len(validation) == 20
    assert torch.equal(torch.cat([train, validation]), corpus)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    data = torch.randint(256, (5_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def inputs(seed: int) -> torch.Tensor:
        return torch.stack([inputs for inputs, _ in islice(Batches(data, 4, 16, seed), 5)])

    assert torch.equal(inputs(seed=7), inputs(seed=7))
    assert not torch.equal(inputs(seed=7), inputs(seed=8))
    assert len(inputs(seed=7).unique(dim=0)) == 5  # it moves on


def test_targets_are_the_bytes_that_follow_and_windows_reach_both_ends():
    data = torch.arange(10, dtype=torch.uint8)
    inputs, targets = next(Batches(data, batch=200, context=7, seed=0))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (200, 7)
    assert torch.equal(targets, inputs + 1)
    assert inputs[:, 0].unique().tolist() == [0, 1, 2]


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="context of 8"):
        Batches(torch.zeros(8, dtype=torch.uint8), batch=1, context=8, seed=0)
