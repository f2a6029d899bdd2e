"""``capturable=True``: the same bits, and right at every replay of a CUDA graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import adamw_triton
from adamw_triton import AdamW
from adamw_triton.selection.auto import Auto
from adamw_triton_kernels import tables
from tests.optimizer.problems import SHAPES, bits, parameters, set_grads, state_bits, train
from tests.optimizer.simulated_graph import SimulatedGraph

FORMATS = [
    pytest.param({"variant": "32bit"}, id="32bit"),
    pytest.param({"variant": "32bit", "amsgrad": True, "maximize": True}, id="amsgrad"),
    pytest.param({"variant": "8bit"}, id="8bit"),
]
REPLAYS = 100


def groups_of(params: Sequence[Parameter], lr: Any = 1e-3) -> list[dict[str, Any]]:
    return [
        {"params": params[:3], "lr": lr, "betas": (0.8, 0.95)},
        {"params": params[3:], "weight_decay": 0.1},
    ]


def pair(lr: Any = 1e-3, device: str = "cpu", **arguments: Any) -> tuple[AdamW, AdamW]:
    """A capturable optimizer and another, which have the same to do."""
    both = []
    for capturable in (True, False):
        params = [Parameter(p.detach().to(device)) for p in parameters()]
        both.append(AdamW(groups_of(params, copy.copy(lr)), capturable=capturable, **arguments))
    return both[0], both[1]


def params_of(optimizer: AdamW) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def everything(optimizer: AdamW) -> tuple[list[bytes], list[dict[str, bytes]]]:
    return bits(params_of(optimizer)), state_bits(optimizer)


def refill(optimizer: AdamW, step: int) -> None:
    """New gradients in the old ones' memory."""
    params = params_of(optimizer)
    stands_in = [torch.empty(param.shape, dtype=param.dtype) for param in params]
    set_grads(stands_in, step)
    for param, other in zip(params, stands_in, strict=True):
        assert param.grad is not None
        param.grad.copy_(other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", FORMATS)
def test_the_bits_are_those_of_any_step(arguments: dict[str, Any]) -> None:
    """Also where parameters have had different numbers of steps, and settings change."""

    def change(optimizer: AdamW) -> Any:
        def before(step: int) -> None:
            params_of(optimizer)[step % 5].grad = None
            optimizer.param_groups[1]["lr"] = 1e-3 / step
            optimizer.grad_scale = torch.tensor(2.0**step)  # type: ignore[attr-defined]

        return before

    ours, other = pair(**arguments)
    for optimizer in (ours, other):
        train(optimizer, 8, before=change(optimizer))
    assert everything(ours) == everything(other)


@pytest.fixture
def interpreted(backend: str) -> None:
    if backend != "triton":
        pytest.skip("only kernels are captured")


@pytest.mark.parametrize("arguments", FORMATS)
@pytest.mark.usefixtures("interpreted")
def test_replays_count_and_see_learning_rates(arguments: dict[str, Any]) -> None:
    lr = torch.tensor(1e-3)
    ours, other = pair(lr, **arguments)
    for optimizer in (ours, other):
        train(optimizer, 2)
    refill(ours, 3)
    refill(other, 3)
    graph = SimulatedGraph()
    with graph.capture():
        ours.step()
    other.step()
    assert everything(ours) == everything(other)
    for step in range(4, 8):
        for optimizer in (ours, other):
            refill(optimizer, step)
            optimizer.param_groups[0]["lr"].fill_(1e-3 * step)
        graph.replay()
        other.step()
    assert everything(ours) == everything(other)


@pytest.mark.usefixtures("interpreted")
def test_graphs_keep_their_gradients_whatever_others_take() -> None:
    """Captured with gradients at new addresses, twice; then a step on yet others, and with a new lr."""
    ours, other = pair(variant="8bit")
    train(ours, 2)
    train(other, 2)
    graphs, grads = [], []
    for step in (3, 4):
        set_grads(params_of(ours), step)
        grads.append([param.grad for param in params_of(ours)])
        graphs.append(SimulatedGraph())
        with graphs[-1].capture():
            ours.step()
        train(other, 1, first=step)
    for optimizer in (ours, other):
        optimizer.param_groups[1]["lr"] = 0.5
        train(optimizer, 1, first=5)
        optimizer.param_groups[1]["lr"] = 1e-3  # as it was captured
    for graph, own in zip(graphs, grads, strict=True):
        graph.replay()
        for param, grad in zip(params_of(other), own, strict=True):
            param.grad = grad
        other.step()
    assert everything(ours) == everything(other)


@pytest.mark.usefixtures("interpreted")
def test_more_captures_than_were_provided_for_are_refused() -> None:
    ours, _ = pair(variant="32bit")
    train(ours, 2)
    for step in range(tables.ROOMS):
        set_grads(params_of(ours), step)
        with SimulatedGraph().capture():
            ours.step()
    set_grads(params_of(ours), 0)
    with SimulatedGraph().capture(), pytest.raises(RuntimeError, match="take one before the capture"):
        ours.step()
    train(ours, 1)  # goes on, and provides for more
    set_grads(params_of(ours), 0)
    with SimulatedGraph().capture():
        ours.step()


def test_what_cannot_be_captured_is_refused_before_anything_changes() -> None:
    ours, other = pair(variant="8bit")
    for optimizer, message in ((other, "capturable=True"), (ours, "take one before the capture")):
        set_grads(params_of(optimizer), 1)
        before = bits(params_of(optimizer))
        with SimulatedGraph().capture(), pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert bits(params_of(optimizer)) == before
        assert not optimizer.state
    train(ours, 1)
    before = bits(params_of(ours))
    params_of(ours)[0].grad = None  # other parameters than before
    with SimulatedGraph().capture(), pytest.raises(RuntimeError, match="take one before the capture"):
        ours.step()
    set_grads(params_of(ours), 2)
    ours.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    with SimulatedGraph().capture(), pytest.raises(RuntimeError, match="found_inf"):
        ours.step()
    assert bits(params_of(ours)) == before
    del ours.found_inf  # type: ignore[attr-defined]
    train(ours, 1, first=2)  # goes on
    train(other, 2)
    assert everything(ours) == everything(other)


@pytest.mark.parametrize("variant", ["paged_32bit", "paged_8bit"])
def test_pages_are_refused(variant: str) -> None:
    with pytest.raises(ValueError, match=f"capturable=True.*variant='{variant}' streams it"):
        AdamW(parameters(), variant=variant, capturable=True)


def test_state_stays() -> None:
    ours, _ = pair()
    train(ours, 1)
    with pytest.raises(RuntimeError, match="offload"):
        ours.offload()
    assert ours.plan is not None
    assert [candidate.name for candidate in ours.plan.candidates] == ["32bit", "8bit"]
    assert isinstance(ours._chooser, Auto)
    assert not ours._chooser._watches


def test_loading_leaves_state_where_it_is() -> None:
    """So a graph goes on being right."""
    ours, other = pair(variant="32bit")
    theirs = torch.optim.AdamW(groups_of(parameters()), capturable=False)
    for optimizer in (ours, theirs):
        train(optimizer, 3)  # type: ignore[arg-type]
    places = [tensor.data_ptr() for entry in ours.state.values() for tensor in entry.values()]
    ours.load_state_dict(theirs.state_dict())
    assert [tensor.data_ptr() for entry in ours.state.values() for tensor in entry.values()] == places
    other.load_state_dict(theirs.state_dict())
    for optimizer in (ours, other):
        for param, same in zip(params_of(optimizer), params_of(theirs), strict=True):  # type: ignore[arg-type]
            param.data.copy_(same)
        train(optimizer, 2, first=4)
    assert everything(ours) == everything(other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_are_capturable(copied: Any) -> None:
    ours, _ = pair(variant="8bit")
    train(ours, 2)
    other = copied(ours)
    assert other.capturable
    for optimizer in (ours, other):
        train(optimizer, 1, first=3)
    assert everything(ours) == everything(other)
    assert all(slot.buffer.scalars.on_device for slot in other._store.slots.values())


# --- On a GPU ---------------------------------------------------------------------------------------


def warm(optimizer: AdamW, steps: int = 2) -> None:
    """On a side stream, as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(1, steps + 1):
            for param, grad in zip(params_of(optimizer), grads_at(step), strict=True):
                param.grad = grad.cuda()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)


def grads_at(step: int) -> list[Tensor]:
    stands_in = [torch.empty(shape) for shape in SHAPES]
    set_grads(stands_in, step)
    return [tensor.grad for tensor in stands_in]  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", FORMATS)
def test_a_graph_replayed_100_times(arguments: dict[str, Any], backend: str) -> None:
    ours, other = pair(torch.tensor(1e-3, device="cuda"), "cuda", **arguments)
    warm(ours)
    warm(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(3, 3 + REPLAYS):
        for optimizer in (ours, other):
            refill(optimizer, step)
            optimizer.param_groups[0]["lr"].fill_(1e-3 / step)
        graph.replay()
        other.step()
    assert everything(ours) == everything(other)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["auto", "8bit"])
def test_a_whole_training_step_in_a_graph(variant: str, backend: str) -> None:
    """Forward, backward and step; the gradients are the graph's own."""
    results = []
    for captured in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
        ).cuda()
        optimizer = AdamW(model.parameters(), lr=1e-3, variant=variant, capturable=captured)
        data = torch.empty(32, 128, device="cuda")

        def step(model: Any = model, optimizer: AdamW = optimizer, data: Tensor = data) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(data).square().mean().backward()
            optimizer.step()

        draw = torch.Generator("cuda").manual_seed(1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                data.normal_(generator=draw)
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for _ in range(20):
            data.normal_(generator=draw)
            graph.replay() if captured else step()
        results.append(everything(optimizer))
    assert results[0] == results[1]


@pytest.mark.gpu
def test_an_eager_step_between_replays_takes_no_table_from_the_graph(backend: str) -> None:
    """Its gradients are where the graph's were when it was captured, and its table is sent nevertheless."""
    ours, other = pair(device="cuda", variant="32bit")
    warm(ours)
    warm(other)
    for optimizer in (ours, other):
        for param, grad in zip(params_of(optimizer), grads_at(3), strict=True):
            param.grad = grad.cuda()  # at new addresses
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    ours.step()  # before any replay
    graph.replay()
    for _ in range(2):
        other.step()
    assert everything(ours) == everything(other)


@pytest.mark.gpu
def test_no_step_of_a_capturable_optimizer_waits_for_the_gpu(backend: str) -> None:
    ours, _ = pair(torch.tensor(1e-3, device="cuda"), "cuda", variant="32bit")
    warm(ours)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_plain_optimizer_is_refused_in_a_capture(backend: str) -> None:
    params = [Parameter(torch.ones(5000, device="cuda"))]
    optimizer = adamw_triton.AdamW(params, variant="32bit")
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
