"""Groups of plain modules: which decay, how fast each learns, and what is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adamw_triton
from adamw_triton import param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)


class Model(nn.Module):
    """What is given, in that order."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        for name, value in given.items():
            setattr(self, name, value)


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


def linear() -> nn.Linear:
    return nn.Linear(4, 4, bias=False)


def bare(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def heights(model: nn.Module) -> dict[str, int]:
    """How often the rate was halved, by what a parameter's name begins with (down to its block)."""
    found: dict[str, int] = {}
    for group in param_groups(model, weight_decay=0.1, lr=1.0, layer_decay=0.5):
        for name in group["param_names"]:
            for tail in (".norm.weight", ".norm.bias", ".linear.weight", ".linear.bias", ".weight", ".bias"):
                name = name.removesuffix(tail)
            assert found.setdefault(name, -int(math.log2(group["lr"]))) == -math.log2(group["lr"]), name
    return found


def decays(model: nn.Module, **settings: Any) -> set[str]:
    groups = param_groups(model, weight_decay=0.1, **settings)
    return {name for group in groups if group["weight_decay"] for name in group["param_names"]}


def tied() -> nn.Module:
    """The head first, as no model has it: the embedding's place counts all the same."""
    model = Model(head=linear(), blocks=blocks(2), embed=nn.Embedding(4, 4))
    model.embed.weight = model.head.weight
    return model


def twice() -> nn.Module:
    block = Block()
    return nn.Sequential(block, block, linear())


def shared() -> nn.Module:
    """Two stacks with a block in common: the top of one, under the top of the other."""
    block = Block()
    lists = [nn.ModuleList([Block(), block]), nn.ModuleList([block, Block()])]
    return Model(first=Model(block=lists[0]), second=Model(block=lists[1]), head=linear())


class Titan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(4, 4)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(2)})
        self.output = linear()


DEPTHS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "embedding, layers, head": (
        lambda: Model(embed=nn.Embedding(4, 4), blocks=blocks(2), head=linear()),
        {"embed": 3, "blocks.0": 2, "blocks.1": 1, "head": 0},
    ),
    "one layer": (
        lambda: Model(embed=nn.Embedding(4, 4), blocks=blocks(1), head=linear()),
        {"embed": 2, "blocks.0": 1, "head": 0},
    ),
    "nothing above the layers": (
        lambda: Model(stem=linear(), blocks=blocks(2)),
        {"stem": 2, "blocks.0": 1, "blocks.1": 0},
    ),
    "an embedding registered last": (
        lambda: Model(blocks=blocks(1), head=linear(), embed=nn.Embedding(4, 4)),
        {"embed": 2, "blocks.0": 1, "head": 0},
    ),
    "bare parameters": (
        lambda: Model(scale=bare(), cls_token=bare(1, 1, 4), pos_embed=bare(1, 3, 4), blocks=blocks(1)),
        {"cls_token": 2, "pos_embed": 2, "blocks.0": 1, "scale": 0},
    ),
    "layers without parameters": (
        lambda: Model(blocks=nn.ModuleList([Block(), nn.Identity(), Block()]), head=linear()),
        {"blocks.0": 2, "blocks.2": 1, "head": 0},
    ),
    "a wrapper": (
        lambda: Model(module=Model(blocks=blocks(2), norm=nn.LayerNorm(4)), head=linear()),
        {"module.blocks.0": 2, "module.blocks.1": 1, "module": 0, "head": 0},
    ),
    "a longer list in each layer": (
        lambda: Model(layers=nn.ModuleList(Model(experts=blocks(3)) for _ in range(2)), head=linear()),
        {f"layers.{i}.experts.{j}": 2 - i for i in range(2) for j in range(3)} | {"head": 0},
    ),
    "a model in a Sequential": (
        lambda: nn.Sequential(linear(), Model(blocks=blocks(2)), nn.ReLU(), linear()),
        {"0": 3, "1.blocks.0": 2, "1.blocks.1": 1, "3": 0},
    ),
    "a head of several modules": (
        lambda: Model(blocks=nn.Sequential(*blocks(2)), head=nn.Sequential(linear(), nn.ReLU(), linear())),
        {"blocks.0": 2, "blocks.1": 1, "head.0": 0, "head.2": 0},
    ),
    "nested Sequentials": (
        lambda: nn.Sequential(
            linear(), nn.Sequential(*(nn.Sequential(linear()) for _ in range(2))), linear()
        ),
        {"0": 3, "1.0.0": 2, "1.1.0": 1, "2": 0},
    ),
    "single modules": (
        lambda: nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU(), linear()),
        {"0": 2, "2": 1, "4": 0},
    ),
    "stages side by side": (
        lambda: Model(
            stem=linear(), layer1=nn.Sequential(*blocks(2)), layer2=nn.Sequential(*blocks(3)), fc=linear()
        ),
        {"stem": 6, "layer1.0": 5, "layer1.1": 4, "layer2.0": 3, "layer2.1": 2, "layer2.2": 1, "fc": 0},
    ),
    "an encoder and a decoder": (
        lambda: Model(
            shared=nn.Embedding(4, 4),
            encoder=Model(stem=linear(), block=blocks(3), last=linear()),
            bridge=linear(),
            decoder=Model(block=blocks(1), last=linear()),
            head=linear(),
        ),
        {"shared": 4, "encoder.stem": 4, "encoder.block.0": 3, "encoder.block.1": 2, "encoder.block.2": 1}
        | {"encoder.last": 0, "bridge": 4, "decoder.block.0": 1, "decoder.last": 0, "head": 0},
    ),
    "layers in a dict": (Titan, {"tokens": 3, "layers.0": 2, "layers.1": 1, "output": 0}),
    "tied, the head first": (tied, {"head": 2, "blocks.0": 1, "blocks.1": 0}),
    "a block that comes twice": (twice, {"0": 2, "2": 0}),
    "a block of two stacks": (
        shared,
        {"first.block.0": 2, "first.block.1": 2, "second.block.1": 1, "head": 0},
    ),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depth(name: str) -> None:
    make, expected = DEPTHS[name]
    assert heights(make()) == expected


@pytest.mark.parametrize("name", DEPTHS)
def test_every_parameter_once(name: str) -> None:
    model = DEPTHS[name][0]()
    for layer_decay in (None, 0.9, 1.0):
        groups = param_groups(model, weight_decay=0.1, lr=1.0, layer_decay=layer_decay)
        found = [id(param) for group in groups for param in group["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(param) for param in model.parameters()}
        keys = [(group.get("depth"), group["weight_decay"]) for group in groups]
        assert len(keys) == len(set(keys)), "one group for each depth and decay"


class OddNorm(nn.Module):
    """Two dimensions, called weight: a norm by its class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = bare(2, 2)


class OddNormInHalf(OddNorm):
    pass


class FancyEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grid, self.proj = bare(2, 2), linear()


class Normalizer(nn.Linear):
    pass


DECAYING: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "linear": (lambda: nn.Linear(2, 2), {"weight"}),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.GroupNorm(1, 2)),
        {"0.weight"},
    ),
    "a norm of images": (lambda: Model(norm=nn.LayerNorm((2, 2)), linear=linear()), {"linear.weight"}),
    "norms by class": (lambda: Model(a=OddNorm(), b=OddNormInHalf(), c=Normalizer(2, 2)), {"c.weight"}),
    "RMSNorm": (lambda: Model(norm=nn.RMSNorm(4)), set()),
    "embeddings": (lambda: Model(a=nn.Embedding(2, 2), b=nn.EmbeddingBag(2, 2)), set()),
    "embeddings by class": (lambda: Model(a=FancyEmbeddings()), {"a.proj.weight"}),
    "embeddings by name": (
        lambda: Model(
            cls_token=bare(1, 1, 2), pos_embed=bare(1, 2, 2), query_tokens=bare(2, 2), probe=bare(2, 2)
        ),
        {"probe"},
    ),
    "biases of two dimensions": (lambda: Model(gate_bias=bare(2, 2), gate=bare(2, 2)), {"gate"}),
    "recurrent": (lambda: nn.LSTM(2, 2), {"weight_ih_l0", "weight_hh_l0"}),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {"in_proj_weight", "out_proj.weight"},
    ),
    "vectors": (lambda: Model(gamma=bare(3), scale=bare(), weight=bare(1, 1)), {"weight"}),
    "lazy": (lambda: Model(a=nn.LazyLinear(2), b=nn.LazyBatchNorm1d()), {"a.weight"}),
    "tied": (tied, {"blocks.0.linear.weight", "blocks.1.linear.weight"}),
}


@pytest.mark.parametrize("name", DECAYING)
def test_what_decays(name: str) -> None:
    make, expected = DECAYING[name]
    assert decays(make()) == expected


def language_model() -> nn.Module:
    return Model(embed=nn.Embedding(4, 4), blocks=blocks(2), head=nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("no_decay", "spared"),
    [
        ((), set()),
        (["biases"], {"bias"}),
        (["vectors"], {"bias", "norm"}),
        (["biases", "norms"], {"bias", "norm"}),
        (("embeddings",), {"embed"}),
        (("embeddings", "head.*"), {"embed", "head"}),
        ((item for item in ("*.norm.*", "*.bias")), {"norm", "bias"}),
        (["blocks.[0-9].linear.weight", "vectors"], {"bias", "norm", "blocks"}),
    ],
)
def test_kinds_and_patterns_replace_the_default(no_decay: Any, spared: set[str]) -> None:
    model = language_model()
    names = {name for name, _ in model.named_parameters()}
    assert decays(model, no_decay=no_decay) == {
        name for name in names if not spared.intersection(name.split("."))
    }


def test_frozen_parameters_are_left_out_and_layers_keep_their_depth() -> None:
    model = language_model()
    before = heights(model)
    for module in (model.embed, model.head, model.blocks[0]):
        module.requires_grad_(False)
    assert heights(model) == {"blocks.1": before["blocks.1"]}
    assert param_groups(model, no_decay=["embed.*", "vectors"]), "a pattern may be for what is frozen"
    with pytest.raises(ValueError, match="Model has no parameter that requires gradients"):
        param_groups(model.requires_grad_(False))


def test_what_is_not_given_is_the_optimizer_s() -> None:
    decaying, others = param_groups(language_model())
    assert set(decaying) == {"params", "param_names"}
    assert others["weight_decay"] == 0
    assert "lr" not in others
    optimizer = adamw_triton.AdamW(param_groups(language_model()), lr=3e-4, weight_decay=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0]


def test_each_group_has_a_tensor_of_its_own() -> None:
    """A scheduler multiplies in place."""
    lr = torch.tensor(1.0)
    for layer_decay in (None, 0.5):
        groups = param_groups(language_model(), lr=lr, layer_decay=layer_decay)
        assert len({id(group["lr"]) for group in groups} | {id(lr)}) == len(groups) + 1
        assert float(groups[-1]["lr"]) == 1
        assert all(isinstance(group["lr"], torch.Tensor) for group in groups)


NUMBER = "must be a number finite and >= 0, or None"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weight_decay": -0.1}, ValueError, r"Invalid weight_decay: -0.1; it must be finite and >= 0"),
        ({"weight_decay": math.nan}, ValueError, "Invalid weight_decay: nan"),
        ({"weight_decay": True}, TypeError, f"weight_decay {NUMBER}, got True"),
        ({"weight_decay": "0.1"}, TypeError, f"weight_decay {NUMBER}, got '0.1'"),
        ({"lr": -1}, ValueError, "Invalid lr: -1"),
        ({"lr": math.inf}, ValueError, "Invalid lr: inf"),
        ({"lr": np.float32("nan")}, ValueError, "Invalid lr: nan"),
        ({"lr": False}, TypeError, f"lr {NUMBER}, got False"),
        ({"lr": torch.ones(2)}, TypeError, f"lr {NUMBER}, got tensor"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid lr: -1"),
        (
            {"lr": 1.0, "layer_decay": 1.1},
            ValueError,
            "Invalid layer_decay: 1.1; it must be above 0 and at most 1",
        ),
        ({"lr": 10**400}, ValueError, "Invalid lr: 1000"),
        ({"lr": 1.0, "layer_decay": 0}, ValueError, "Invalid layer_decay: 0"),
        ({"lr": 1.0, "layer_decay": -0.5}, ValueError, "Invalid layer_decay: -0.5"),
        ({"lr": 1.0, "layer_decay": math.nan}, ValueError, "Invalid layer_decay: nan"),
        ({"lr": 1.0, "layer_decay": True}, TypeError, "layer_decay must be a number above 0 and at most 1"),
        ({"layer_decay": 0.9}, ValueError, "layer_decay=0.9 needs lr"),
        ({"no_decay": "bias"}, TypeError, "no_decay must be a sequence of kinds and patterns, got 'bias'"),
        ({"no_decay": None}, TypeError, "no_decay must be a sequence of kinds and patterns, got None"),
        ({"no_decay": [3]}, TypeError, "no_decay must have strings, got 3"),
        ({"no_decay": ["biases", "layernrom.*"]}, ValueError, r"'layernrom.\*' is no kind .*'embed.weight'"),
        ({"no_decay": ["bias"]}, ValueError, "'bias' is no kind .'biases', 'norms'"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(language_model(), **settings)


def test_what_fsdp_has_flattened_has_no_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    next(model.parameters())._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"FSDP \(version 1\).*before it is wrapped"):
        param_groups(model)


def test_layers_are_needed_for_their_decay() -> None:
    model = Model(embed=nn.Embedding(2, 2), norm=nn.LayerNorm(2), stem=nn.Sequential(linear()))
    with pytest.raises(ValueError, match=r"layer_decay=0.5 needs layers, and Model has no nn.ModuleList"):
        param_groups(model, lr=1.0, layer_decay=0.5)
    assert len(param_groups(model, lr=1.0)) == 2


def test_parameters_alone_have_no_structure() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        param_groups(nn.Linear(2, 2).parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [adamw_triton.AdamW, torch.optim.AdamW])
def test_optimizers_take_them(make: Any) -> None:
    model = language_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(param_groups(model, weight_decay=0.1, lr=0.1, layer_decay=0.5))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            expected = before[name] * (1 - group["lr"] * group["weight_decay"]) - group["lr"]
            torch.testing.assert_close(param.detach(), expected)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [group["depth"] for group in optimizer.param_groups] == [0, 1, 1, 2, 2, 3, 3]


def test_plan_takes_them() -> None:
    with torch.device("meta"):
        model = language_model()
    plans = [
        adamw_triton.plan(given, gpu_memory="T4", host_memory="8GiB").to_dict()
        for given in (model, param_groups(model, weight_decay=0.1))
    ]
    assert plans[0] == plans[1]


def test_a_schedule_of_the_weight_decay() -> None:
    """The docstring's, word for word."""
    assert param_groups.__doc__ is not None
    lines = [
        line
        for line in param_groups.__doc__.splitlines()
        if "optimizer.param_groups" in line or "/ steps" in line
    ]
    assert len(lines) == 2
    optimizer = adamw_triton.AdamW(param_groups(language_model(), weight_decay=0.1, lr=0.1))
    exec("\n".join(line[8:] for line in lines), {"optimizer": optimizer, "step": 3, "steps": 4})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1 * 0.25, 0]
