"""Products with frozen weights, by the faster of the libraries that torch brings along.

On a CPU torch passes float32 matrices to MKL, which runs its fastest code on Intel's processors
only; oneDNN takes half the time or twice as long, by processor, by shape and by whether the weight
is transposed, as it is in the backward pass. So both are timed once for each class of shapes; the
result is the same to float32 rounding (benchmarks/training.py has what it brings).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.remembered import lowered
from vlmlayers.runs import processor

MOST_ROWS = 4096  # bounds what timing costs; a batch of a vision tower has about as many
ROUNDS, LEAST_ROUNDS = 4, 2
ENOUGH = 0.1  # seconds of timing, after which the least rounds suffice
# A tie within the spread of timings goes to torch, and so does what is too small to be timed: else
# noise would choose, and a run that is resumed in another process would round otherwise.
WORTH_IT = 0.9
LEAST = 1 << 20  # multiplications of a product, some 50 µs
# What is faster depends on the threads and the load of a process: no other folder's are taken.
_timed: dict[ShapeClass, TimedProduct] = {}


@dataclass(frozen=True)
class ShapeClass:
    """Products that one timing stands for.

    Attributes:
        rows: Rows of the input, up to the next power of two, at most `MOST_ROWS`.
        width_in: Columns of the input.
        width_out: Columns of the result.
        transposed: The weight lies in memory by columns.
        threads: Threads that multiply.
    """

    rows: int
    width_in: int
    width_out: int
    transposed: bool
    threads: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> ShapeClass:
        """Return the class of `x · weightᵀ`."""
        width_out, width_in = weight.shape
        rows = x.numel() // max(width_in, 1)
        # By powers of two, or prompts of every length would be timed anew.
        most = min(1 << max(rows - 1, 0).bit_length(), MOST_ROWS)
        transposed = not weight.is_contiguous()
        return cls(most, width_in, width_out, transposed, torch.get_num_threads())


@dataclass(frozen=True)
class TimedProduct:
    """How long each library took for one product, in seconds, and which was taken.

    Attributes:
        torch: By `torch.nn.functional.linear`.
        onednn: By oneDNN.
        library: `torch` or `onednn`.
    """

    torch: float
    onednn: float
    library: str


def timed_products() -> list[dict[str, Any]]:
    """Return what was timed and which library was taken on which processor, as JSON values."""
    here = {"processor": processor()}
    return [asdict(shape) | asdict(timed) | here for shape, timed in _timed.items()]


def adopt_products(recorded: Iterable[Mapping[str, Any]]) -> bool:
    """Take the libraries that another process took on such a processor, and round as it did.

    A run that goes on ends with the bytes of one that was never stopped, whichever library would
    win a new timing by a hair.

    Args:
        recorded: What `timed_products` returned there.

    Returns:
        Whether this process has taken another library for any of them before.
    """
    before = dict(_timed)
    for one in recorded:
        if one.get("processor") == processor():
            shape = ShapeClass(**{field.name: one[field.name] for field in fields(ShapeClass)})
            _timed[shape] = TimedProduct(one["torch"], one["onednn"], one["library"])
    return any(_timed[shape].library != own.library for shape, own in before.items())


def forget_products() -> None:
    """Forget all timings: each class of shapes is timed anew at its next product."""
    _timed.clear()


def onednn_pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN multiplies `x · weightᵀ` faster than torch does on this machine.

    Small products are torch's. The first one of a class of larger shapes has both timed: some
    milliseconds, and for the largest about as long as four such products.
    """
    shape = ShapeClass.of(x, weight)
    if shape.rows * shape.width_in * shape.width_out < LEAST:
        return False
    if shape not in _timed:
        _timed[shape] = _time(shape)
    return _timed[shape].library == "onednn"


@torch.no_grad()
def _time(shape: ShapeClass) -> TimedProduct:
    """Time both libraries in turn, the best of some rounds each."""
    # Ones, not uninitialised memory: subnormal numbers in it would multiply many times slower.
    x, weight = torch.ones(shape.rows, shape.width_in), torch.ones(shape.width_out, shape.width_in)
    # As the backward pass has it: how the weight lies in memory decides which library wins.
    if shape.transposed:
        weight = weight.t().contiguous().t()
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: F.linear(x, weight),
        lambda: onednn_linear(x, weight, None),
    )
    # In turn, so that another process's load falls on both; the minimum, since load and the first
    # call only add.
    best, began = [float("inf")] * len(ways), time.perf_counter()
    for count in range(1, ROUNDS + 1):
        for number, multiply in enumerate(ways):
            start = time.perf_counter()
            multiply()
            best[number] = min(best[number], time.perf_counter() - start)
        if count >= LEAST_ROUNDS and time.perf_counter() - began > ENOUGH:
            break
    torchs, onednns = best
    library = "onednn" if onednns < WORTH_IT * torchs else "torch"
    return TimedProduct(torchs, onednns, library)


@cache
def has_onednn() -> bool:
    """Return whether torch offers oneDNN's linear map and it multiplies as torch does."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 3, 8), (8, 16), (16,)))
    try:
        found = onednn_linear(x, weight.t(), bias)
    except (AttributeError, RuntimeError, TypeError):
        return False  # built without it, or by a torch whose operator has another signature
    return torch.allclose(found, F.linear(x, weight.t(), bias), atol=1e-5)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x · weightᵀ + bias` multiplied by oneDNN."""
    # A private operator, which torch's own compiler uses on CPUs. It may change between versions;
    # `has_onednn` compares its result before anything relies on it.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def suits(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN can take a product: float32 on a CPU, outside autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and has_onednn()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """Return `x · weightᵀ + bias` without a graph.

    Args:
        x: (…, width in).
        weight: (width out, width in); may be a transposed view.
        bias: (width out,) or None.
        onednn: Whether `suits` was asked and said yes; oneDNN multiplies where it is faster.
    """
    if onednn and onednn_pays(x, weight):
        return onednn_linear(x.contiguous(), weight, bias)
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """A linear map with the gradient of its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not by `save_for_backward`: a frozen weight outlives the graph and is never changed.
        ctx.weight = weight
        return product(x, weight, bias, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return product(grads[0], ctx.weight.t(), None, True), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool = True) -> Tensor:
    """Return `x · weightᵀ + bias` with a gradient for x alone.

    Args:
        x: (…, width in).
        weight: (width out, width in), frozen.
        bias: (width out,), frozen, or None.
        onednn: Use oneDNN where it suits and is faster.
    """
    if onednn and suits(x, weight):
        return _FrozenLinear.apply(x, weight, bias)
    return F.linear(x, lowered(weight), None if bias is None else lowered(bias))
