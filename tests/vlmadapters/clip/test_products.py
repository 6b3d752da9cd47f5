"""Products with frozen weights are torch's whichever library is faster, and say which it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from vlmadapters.clip import products
from vlmadapters.clip.products import (
    adopt_products,
    forget_products,
    frozen_linear,
    has_onednn,
    onednn_linear,
    suits,
    timed_products,
)
from vlmadapters.protocols.cells import Cell, CellFolder

Costs = dict[bool, tuple[float, float]]  # transposed or not: seconds of torch and of oneDNN


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Costs], list[str]]]:
    """Set what a product costs by either library on a stopped clock, and list who multiplied."""
    now, calls, costs = [0.0], [], {False: (1.0, 1.0), True: (1.0, 1.0)}
    real = F.linear, onednn_linear

    def stand_in(number: int) -> Callable[..., torch.Tensor]:
        def multiply(x: torch.Tensor, weight: torch.Tensor, bias: object = None) -> torch.Tensor:
            now[0] += costs[not weight.is_contiguous()][number]
            calls.append(("torch", "onednn")[number])
            return real[number](x, weight, bias)

        return multiply

    def price(given: Costs) -> list[str]:
        costs.update(given)
        forget_products()
        return calls

    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(products.F, "linear", stand_in(0))
    monkeypatch.setattr(products, "onednn_linear", stand_in(1))
    has_onednn()
    yield price
    forget_products()


@pytest.mark.skipif(not has_onednn(), reason="this torch brings no oneDNN")
@pytest.mark.parametrize(
    ("costs", "forward", "backward"),
    [
        ({False: (2.0, 1.0), True: (1.0, 2.0)}, "onednn", "torch"),  # an AMD EPYC
        ({False: (1.0, 2.0), True: (2.0, 1.0)}, "torch", "onednn"),
        ({False: (1.0, 0.92), True: (1.0, 1.0)}, "torch", "torch"),  # no difference to speak of
    ],
)
def test_the_faster_library_multiplies_and_is_recorded(
    priced: Callable[[Costs], list[str]], costs: Costs, forward: str, backward: str
) -> None:
    calls = priced(costs)
    x, weight = torch.randn(5, 8).requires_grad_(), torch.randn(6, 8)
    frozen_linear(x, weight, None).sum().backward()
    calls.clear()
    frozen_linear(x, weight, None).sum().backward()  # nothing is timed a second time
    assert calls == [forward, backward]
    told = {one["transposed"]: one for one in timed_products()}
    assert (told[False]["library"], told[True]["library"]) == (forward, backward)
    assert (told[False]["torch"], told[False]["onednn"]) == pytest.approx(costs[False])
    assert (told[False]["width_in"], told[False]["width_out"], told[False]["rows"]) == (8, 6, 8)


@pytest.mark.skipif(not has_onednn(), reason="this torch brings no oneDNN")
def test_one_timing_speaks_for_inputs_of_about_as_many_rows(
    priced: Callable[[Costs], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    priced({})
    weight = torch.randn(6, 8)
    for rows, classes in ((3, 1), (4, 1), (5, 2), (600, 3), (1024, 3), (4000, 4), (50_000, 4)):
        frozen_linear(torch.randn(rows, 8), weight, None)
        assert len(timed_products()) == classes
    assert [one["rows"] for one in timed_products()] == [4, 8, 1024, 4096]
    # What is faster depends on how many threads multiply.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    frozen_linear(torch.randn(4, 8), weight, None)
    assert [one["rows"] for one in timed_products() if one["threads"] == 77] == [4]


@pytest.mark.skipif(not has_onednn(), reason="this torch brings no oneDNN")
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_timed_is_of_its_class_and_one_slow_call_does_not_count(
    transposed: bool, priced: Callable[[Costs], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    priced({transposed: (1.0, 9.0)})
    plain, seen = products.onednn_linear, []

    def warming(x: torch.Tensor, weight: torch.Tensor, bias: object = None) -> torch.Tensor:
        made = plain(x, weight, bias)
        if not seen:
            priced({transposed: (30.0, 0.5)})  # torch later, oneDNN at first
        seen.append((tuple(x.shape), tuple(weight.shape), weight.is_contiguous()))
        return made

    monkeypatch.setattr(products, "onednn_linear", warming)
    weight = torch.randn(8, 6).t() if transposed else torch.randn(6, 8)
    frozen_linear(torch.randn(5, 8), weight, None)
    *timed, last = seen
    assert set(timed) == {((8, 8), (6, 8), not transposed)} and last[0] == (5, 8)
    (told,) = timed_products()
    assert (told["torch"], told["onednn"], told["library"]) == pytest.approx((1.0, 0.5, "onednn"))


@pytest.mark.skipif(not has_onednn(), reason="this torch brings no oneDNN")
@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 4), (0.015, 3), (0.3, 2)])
def test_long_products_are_timed_less_often(
    priced: Callable[[Costs], list[str]], seconds: float, rounds: int
) -> None:
    calls = priced({False: (seconds, 2 * seconds)})
    frozen_linear(torch.randn(4, 8), torch.randn(6, 8), None)
    assert calls == ["torch", "onednn"] * rounds + ["torch"]  # and then the product itself


@pytest.mark.skipif(not has_onednn(), reason="this torch brings no oneDNN")
def test_what_another_process_of_this_processor_took_is_taken(
    priced: Callable[[Costs], list[str]], tmp_path: Path
) -> None:
    """As a run that goes on reads it from its finished cells; another processor's says nothing."""
    calls = priced({False: (2.0, 1.0)})
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    frozen_linear(x, weight, None)
    cell, folder = Cell("a", {}), CellFolder(tmp_path)
    folder.write(cell, [])
    priced({False: (1.0, 2.0)})
    assert folder.read(cell) == []
    calls.clear()
    frozen_linear(x, weight, None)
    assert calls == ["onednn"]
    told = timed_products()
    assert (told[0]["torch"], told[0]["onednn"]) == (2.0, 1.0), "as it was timed there"
    forget_products()
    adopt_products([told[0] | {"processor": "another"}, {"library": "onednn"}])
    assert timed_products() == []


def test_what_is_too_small_to_be_timed_is_multiplied_by_torch_in_every_process() -> None:
    forget_products()
    weight = torch.randn(64, 64)
    frozen_linear(torch.randn(128, 64), weight, None)
    assert timed_products() == []
    if has_onednn():
        frozen_linear(torch.randn(257, 64), weight, None)
        assert [one["rows"] for one in timed_products()] == [512]
    forget_products()


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 8)])
def test_value_and_gradient_are_those_of_torch(
    shape: tuple[int, ...], biased: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "onednn_pays", lambda x, weight: True)
    generator = torch.Generator().manual_seed(0)
    strided = torch.randn(shape[:-1] + (16,), generator=generator)[..., ::2]
    weight = torch.randn(6, 8, generator=generator)
    bias = torch.randn(6, generator=generator) if biased else None
    back = torch.randn(shape[:-1] + (6,), generator=generator)
    found = []
    for use in (
        lambda x: frozen_linear(x, weight, bias, onednn),
        lambda x: F.linear(x, weight, bias),
    ):
        x = strided.clone().requires_grad_()
        y = use(x)
        y.backward(back)
        found.append((y, x.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    strided_found = frozen_linear(strided, weight, bias, onednn)
    torch.testing.assert_close(strided_found, found[1][0].detach(), atol=1e-5, rtol=1e-5)


def test_only_float32_on_a_cpu_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    assert suits(x, weight) is has_onednn()
    assert not suits(x.double(), weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not suits(x, weight)

    def absent(*arguments: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(products, "LEAST", 0)
    plain = products.onednn_linear
    for other in (absent, lambda *arguments: 2 * plain(*arguments)):
        monkeypatch.setattr(products, "onednn_linear", other)
        has_onednn.cache_clear()
        assert not has_onednn()
        assert torch.equal(frozen_linear(x, weight, None), F.linear(x, weight))
    monkeypatch.setattr(products, "onednn_linear", plain)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    has_onednn.cache_clear()
    assert not has_onednn()
    has_onednn.cache_clear()
