"""Products with frozen weights by oneDNN are torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlmadapters.clip import arithmetic
from vlmadapters.clip.arithmetic import frozen_linear, has_onednn, suits


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 8)])
def test_value_and_gradient_are_those_of_torch(
    shape: tuple[int, ...], biased: bool, onednn: bool
) -> None:
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

    monkeypatch.setattr(arithmetic, "onednn_linear", absent)
    has_onednn.cache_clear()
    assert not has_onednn()
    assert torch.equal(frozen_linear(x, weight, None), F.linear(x, weight))
    has_onednn.cache_clear()
