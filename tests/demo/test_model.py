"""The demo's transformer."""

import pytest
import torch

from adamw_triton.demo.model import ByteTransformer


def test_has_about_half_a_million_parameters_by_default():
    parameters = sum(parameter.numel() for parameter in ByteTransformer().parameters())
    assert parameters == pytest.approx(0.5e6, rel=0.1)


def test_a_later_byte_changes_no_earlier_logits():
    torch.manual_seed(0)
    model = ByteTransformer(width=32, depth=2, heads=4, context=12)
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (tokens[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 12, 256)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    # and everything from there on has seen it
    assert ((after - before)[:, 7:].abs().amax(dim=-1) > 1e-4).all()


def test_order_matters():
    """Without positions, attention sees the earlier bytes as a bag."""
    torch.manual_seed(0)
    model = ByteTransformer(width=32, depth=1, heads=4, context=3)
    ab, ba = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert (ab - ba)[0, -1].abs().max() > 1e-4


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="30 does not divide into 4"):
        ByteTransformer(width=30, heads=4)
