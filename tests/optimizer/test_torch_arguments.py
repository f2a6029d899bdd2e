"""Arguments and group keys that other AdamWs and frameworks have: taken, refused or warned of; never taken in
silence where somebody expects an effect."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

from adamw_triton import AdamW
from tests.optimizer.problems import bits, parameters, train


def test_groups_hold_what_those_of_torchs_do() -> None:
    """torch.distributed.checkpoint asks a checkpoint for all of it, and for no more."""
    for arguments in ({}, {"capturable": True, "foreach": True, "amsgrad": True, "variant": "32bit"}):
        ours = AdamW(parameters(), **arguments)  # type: ignore[arg-type]
        arguments.pop("variant", None)
        theirs = torch.optim.AdamW(parameters(), **arguments)  # type: ignore[arg-type]
        assert [group.keys() for group in ours.param_groups] == [theirs.param_groups[0].keys()]
        assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
        ours.load_state_dict(
            {"state": {}, "param_groups": [{**OLD, "params": list(range(len(parameters())))}]}
        )
        assert ours.param_groups[0].keys() - {"state_bits"} == theirs.param_groups[0].keys()


OLD = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "state_bits": None}
"""A group as it was saved before it held as much."""


def test_every_argument_of_torchs_is_taken() -> None:
    theirs = inspect.signature(torch.optim.AdamW).parameters
    ours = inspect.signature(AdamW).parameters
    assert theirs.keys() <= ours.keys()
    arguments = {name: p.default for name, p in theirs.items() if name != "params"}
    assert {name: ours[name].default for name in arguments} == arguments
    assert bits(train(AdamW(parameters(), **arguments), 2)) == bits(train(AdamW(parameters()), 2))


@pytest.mark.parametrize("value", [None, False, True])
@pytest.mark.parametrize("key", ["fused", "foreach"])
def test_a_choice_among_implementations_changes_nothing(key: str, value: bool | None) -> None:
    plain = bits(train(AdamW(parameters()), 2))
    chosen: Any = {key: value}
    optimizer = AdamW(parameters(), **chosen)
    assert optimizer.param_groups[0][key] is value
    assert bits(train(optimizer, 2)) == plain
    grouped = AdamW([{"params": parameters(), **chosen}])
    assert bits(train(grouped, 2)) == plain
    theirs = torch.optim.AdamW(parameters(), lr=1e-2, **chosen)
    train(theirs, 1)
    grouped.load_state_dict(theirs.state_dict())
    train(grouped, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"differentiable": True}, "differentiable=True needs .*torch.optim.AdamW"),
        ({"fused": "yes"}, "Invalid fused: 'yes'; it must be None, False or True"),
        ({"foreach": 2}, "Invalid foreach: 2"),
    ],
)
def test_what_nobody_could_honour_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **arguments)
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": parameters(), **arguments}])
    optimizer = AdamW(parameters())
    optimizer.param_groups[0].update(arguments)
    with pytest.raises(ValueError, match=message):
        train(optimizer, 1)
    assert bits(optimizer.param_groups[0]["params"]) == bits(parameters())


@pytest.mark.parametrize("key", ["variant", "memory_budget", "transfer", "block_size"])
def test_arguments_of_the_optimizer_are_none_of_a_group(key: str) -> None:
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match=f"group 1 sets {key}='8bit', which is of the whole optimizer"):
        optimizer.add_param_group({"params": parameters(), key: "8bit"})
    assert len(optimizer.param_groups) == 1


def test_a_group_may_repeat_what_the_optimizer_was_given() -> None:
    """As ZeroRedundancyOptimizer does. What goes by all gradients it may not: ranks have a part of them."""
    group = {"params": parameters(), "variant": "8bit", "nonfinite": "propagate"}
    optimizer = AdamW([group], variant="8bit")
    train(optimizer, 1)
    with pytest.raises(ValueError, match="group 1 sets variant='32bit', which is of the whole"):
        optimizer.add_param_group({"params": parameters(), "variant": "32bit"})
    for given in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}):
        with pytest.raises(ValueError, match=r"clip_grad_norm_ before step\(\)"):
            AdamW([{"params": parameters(), **given}], **given)


NEARLY = ("state_bit", "weight_decays", "beta", "maximise", "amsgrads", "LR", "stateBits")
OF_OTHERS = ("optim_bits", "learning_rate", "wd")


@pytest.mark.parametrize("key", [*NEARLY, *OF_OTHERS])
def test_misspelt_keys_are_warned_of(key: str) -> None:
    with pytest.warns(UserWarning, match=f"group 0 has a key '{key}', which changes nothing: was '.*' meant"):
        AdamW([{"params": parameters(), key: 8}])


OTHERS = (
    "fused",
    "foreach",
    "capturable",
    "initial_lr",
    "max_lr",
    "min_lr",
    "lr_scale",
    "lr_mult",
    "wd_mult",
    "name",
)
OTHERS += (
    "swanlab",
    "betas_schedule",
    "layer",
    "use_muon",
    "decoupled_weight_decay",
    "max_momentum",
    "d",
    "k",
)


@pytest.mark.parametrize("key", OTHERS)
def test_keys_of_frameworks_are_kept(key: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = AdamW([{"params": parameters(), key: None}])
    train(optimizer, 1)
    assert key in optimizer.state_dict()["param_groups"][0]


def test_groups_made_for_torchs() -> None:
    """A wrapper hands its own groups to whatever it wraps."""
    params = parameters()
    optimizer = AdamW(params)
    optimizer.param_groups = torch.optim.AdamW(params, lr=0.5).param_groups
    assert bits(train(optimizer, 2)) == bits(train(AdamW(parameters(), lr=0.5), 2))


def test_names_are_kept_as_long_as_they_fit() -> None:
    optimizer = AdamW([("a", parameters()[0]), ("b", parameters()[1])])
    bad = torch.ones(3, dtype=torch.float64)
    bad.grad = bad.clone()
    optimizer.param_groups[0]["params"][1] = bad
    with pytest.raises(TypeError, match=r"^parameter 'b' has"):
        optimizer.step()
    optimizer.param_groups[0]["params"].append(bad)
    with pytest.raises(TypeError, match=r"^parameter 1 of group 0 has"):
        optimizer.step()
