"""The recorded step rehearsed without a GPU: streams and graphs of torch are stood in for.

The stand-in records by running a step and undoing what it did, and replays by running the same
function on the tensors it was recorded with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from stepping import trainer_of
from torch import Tensor

import vlmadapters as va
from vlmadapters.clip.savings import Savings
from vlmadapters.methods import METHODS
from vlmadapters.methods.base import Step
from vlmadapters.methods.mma.config import MMAConfig
from vlmadapters.training.graphs import WARM_UP, StepGraph
from vlmadapters.training.optimization import new_optimizer, set_rate
from vlmadapters.training.recipes import TrainConfig
from vlmadapters.training.trainer import Trainer
from vlmlayers.errors import UserError

CONFIG = MMAConfig.span(2, 3, dim=4, scale=0.1)
TRAIN = TrainConfig(lr=0.05, epochs=3, batch_size=2, shots=2)


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for streams and graphs; return what is asked of them."""
    seen: list[str] = []

    class Graph:
        def replay(self) -> None:
            seen.append("replay")

    @contextmanager
    def graph(made: Graph, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # other threads prepare images meanwhile
        seen.append("record")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: seen.append("aside") or nullcontext())
    return seen


def test_a_step_is_recorded_after_warming_up_and_then_only_replayed(log: list[str]) -> None:
    graph, asked = StepGraph(), []

    def double(x: Tensor) -> list[Tensor]:
        asked.append(x)
        return [2 * x]

    for number in range(WARM_UP + 3):
        found = graph.run(double, torch.full((2,), float(number)))
    assert log == ["aside"] * WARM_UP + ["record"] + ["replay"] * 3
    assert len(asked) == WARM_UP + 1
    assert {x.data_ptr() for x in asked} == {graph.inputs[0].data_ptr()}
    assert graph.inputs[0].tolist() == [WARM_UP + 2.0] * 2  # a replay reads what came last
    assert found[0].data_ptr() != graph.outputs[0].data_ptr()  # the next replay writes there


def test_other_shapes_run_as_usual(log: list[str]) -> None:
    graph = StepGraph()
    for size in (3, 2, 3, 2, 3, 3):
        found = graph.run(lambda x: [x.sum()], torch.ones(size))
        assert size == 3 or found[0] == 2
    assert log == ["aside"] * 3 + ["record", "replay"]


def test_what_cannot_be_recorded_is_one_line(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = StepGraph()
    for _ in range(WARM_UP):
        graph.run(lambda x: [x], torch.ones(1))

    def reads(x: Tensor) -> list[Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(UserError, match=r"cannot be recorded .*capturing.*; leave cuda_graph off"):
        graph.run(reads, torch.ones(1))


def state_of(made: Trainer) -> list[tuple[Tensor, Tensor]]:
    """Return every tensor that a step changes, with a copy."""
    found = []
    for run in made.runs:
        found += [p.data for p in run.method.parameters()]
        found += [v for s in run.optimizer.state.values() for v in s.values() if v is not None]
    return [(one, one.clone()) for one in found]


@pytest.mark.parametrize("views", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_of_replays_is_the_training(
    optimizer: str, views: int, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = replace(TRAIN, optimizer=optimizer, cached_views=views)
    expected = trainer_of(CONFIG, train).fit()[0]
    made = trainer_of(CONFIG, train)
    made.graph = graph = StepGraph()
    call: list[Callable[[], Any]] = []
    run = graph.run

    def noting(step: Callable[..., Any], *inputs: Tensor) -> Any:
        def noted(*given: Tensor) -> Any:
            call[:] = [lambda: step(*given)]
            return step(*given)

        return run(noted, *inputs)

    @contextmanager
    def recording(_: Any, **options: str) -> Iterator[None]:
        before = state_of(made)
        yield
        for tensor, value in before:
            tensor.copy_(value)

    def replay(_: Any) -> None:
        log.append("replay")
        for kept, new in zip(graph.outputs, call[0]()):
            kept.copy_(new)

    monkeypatch.setattr(graph, "run", noting)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    found = made.fit()[0]
    assert log.count("replay") == len(found.losses) - WARM_UP > 0
    assert found.losses == expected.losses
    for key, value in expected.method.official_state_dict().items():
        assert torch.equal(found.method.official_state_dict()[key], value)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_recorded_step_reads_its_rate_from_the_device(optimizer: str) -> None:
    train = replace(TRAIN, optimizer=optimizer, cuda_graph=True)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "rate": r} for r in (1.0, 0.5)]
    made = new_optimizer(groups, train)
    places = [group["lr"].data_ptr() for group in made.param_groups]
    set_rate(made, 0.25, False)
    assert [group["lr"].item() for group in made.param_groups] == [0.25, 0.125]
    assert [group["lr"].data_ptr() for group in made.param_groups] == places
    assert made.param_groups[0].get("capturable", True)


@pytest.mark.parametrize("option", ["device_crops", "cuda_graph"])
def test_what_needs_a_gpu_is_refused_without_one(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} needs a GPU, and the model is on cpu"):
        trainer_of(CONFIG, replace(TRAIN, **{option: True}))
    with pytest.raises(UserError, match=f"{option} takes True or False.*, not 2"):
        replace(TRAIN, **{option: 2})


def test_only_what_changes_results_is_part_of_a_cell() -> None:
    assert replace(TRAIN, cuda_graph=True).identity() == TRAIN.identity()
    assert replace(TRAIN, device_crops=True).identity() != TRAIN.identity()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"zero-shot"}))
def test_methods_say_whether_their_steps_vary(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that reads its number or draws is not the same function again."""
    recipe = va.load_recipe("published", name)
    depths = {"vision": 3, "text": 3}
    config = type(recipe.method).published(depths, **recipe.method.settings())
    made = trainer_of(config, TRAIN)
    if made.runs[0].optimizer is None or made.runs[0].method.varies:
        return
    values, read = {}, []
    for attribute in ("generator", "number", "repeat", "draws"):

        def get(self: Step, attribute: str = attribute) -> Any:
            read.append(attribute)
            return values.get((id(self), attribute))

        def put(self: Step, value: Any, attribute: str = attribute) -> None:
            values[id(self), attribute] = value

        monkeypatch.setattr(Step, attribute, property(get, put), raising=False)
    made.update(made.batches(0)[0])
    assert read == []


def test_methods_whose_steps_vary_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = va.load_recipe("published", "proda")
    monkeypatch.setattr("vlmadapters.training.trainer.resolved", lambda train, device: train)
    train = replace(TRAIN, cuda_graph=True, precision="fp32")
    with pytest.raises(UserError, match="steps of ProDA vary; leave it off"):
        trainer_of(recipe.method, train)


def test_prompts_that_are_prepared_in_each_step_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer reads them on the host."""
    monkeypatch.setattr("vlmadapters.training.trainer.resolved", lambda train, device: train)
    anew = replace(TRAIN, savings=Savings(text_prefix=False), precision="fp32")
    with pytest.raises(UserError, match="text_prefix=false prepares the prompts .*leave it off"):
        trainer_of(CONFIG, replace(anew, cuda_graph=True))
    for train, recorded in ((TRAIN, True), (anew, False)):
        made = trainer_of(CONFIG, train)
        made.train, made.device = train, torch.device("cuda")
        assert made._records() is recorded
