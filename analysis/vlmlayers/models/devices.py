"""Where a model computes, in which precision, and what happens when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlmlayers.arguments import PRECISIONS
from vlmlayers.errors import UserError, check_one_of, one_line
from vlmlayers.runs import processes_launched

T = TypeVar("T")
CGROUP = Path("/sys/fs/cgroup")
_CPU_IS_FULL = ("can't allocate memory", "not enough memory")  # torch has no type of error for it


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device that a name stands for.

    `auto` takes a GPU where there is one. Under `torchrun` each process of a machine takes a GPU
    of its own where none is numbered. A GPU that is chosen becomes the process's current one.

    Raises:
        UserError: There is no such kind of device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type != "cuda" or not torch.cuda.is_available():
            return found
        if found.index is None:
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        # Libraries that allocate on the current device would all meet on GPU 0 otherwise.
        torch.cuda.set_device(found)
    except RuntimeError as error:
        many = str(device) == "cuda" and processes_launched() > 1
        way = "start no more processes than the machine has GPUs" if many else "use 'cpu' or 'cuda'"
        raise UserError(f"cannot use device {str(device)!r} ({one_line(error)}); {way}") from error
    return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision that a run computes in: `fp32`, `tf32`, `fp16` or `bf16`.

    `auto` is fp32 on a CPU and fp16 on a GPU, in which the recipes were published: bfloat16 keeps
    eight bits, and what an adapter of scale 0.001 adds to a block is mostly lost in them.

    Raises:
        UserError: There is no such precision, or the device only emulates it.
    """
    check_one_of("precision", precision, PRECISIONS)
    on_gpu = device.type == "cuda"
    if precision == "auto":
        return "fp16" if on_gpu else "fp32"
    # False leaves emulation out, which torch would count as support.
    if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} only emulates bf16, slowly; use fp16 or fp32"
        )
    if precision == "tf32" and not (on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError(
            f"precision tf32 needs a GPU with TF32 (Ampere or later), and {device} has none; use "
            "fp32"
        )
    return precision


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Hold a GPU's float32 products at TF32 for `tf32`, and at float32 for any other precision.

    The setting is the process's, so it holds for backward passes too, which know no autocast.
    """
    cudnn, newer = torch.backends.cudnn, _newer_settings()
    own = [(part, part.fp32_precision) for part in newer]
    products = _unless_mixed(torch.get_float32_matmul_precision)
    convolutions = _unless_mixed(lambda: cudnn.allow_tf32)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn.allow_tf32 = precision == "tf32"
    for part in newer:  # where the older way leaves it to what is set for all of torch
        part.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products or "highest")
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for part, before in own:
            part.fp32_precision = before


@contextmanager
def casts_kept(model: nn.Module) -> Iterator[None]:
    """Have autocast cast each frozen weight of a model once for all passes inside, not in each.

    Torch keeps casts of parameters that want gradients alone, outside inference mode, until its
    outermost region ends. What it keeps for the caller may be of weights that have changed since,
    and what it keeps here would have no gradients in the caller's next step: both are dropped.
    """
    floats = (w for w in model.parameters() if w.is_floating_point())
    frozen = [w for w in floats if not (w.requires_grad or w.is_inference())]
    torch.clear_autocast_cache()
    torch.autocast_increment_nesting()
    try:
        for weight in frozen:
            weight.requires_grad_()
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


def _newer_settings() -> list[Any]:
    """Return what torch sets TF32 at since 2.9, of products and convolutions; none before."""
    backends: Any = torch.backends
    cudnn = (backends.cudnn, "conv"), (backends.cudnn, "rnn")
    places = (backends.cuda, "matmul"), *cudnn, (backends.mkldnn, "matmul")
    found = [getattr(backend, name, None) for backend, name in places]
    return [part for part in found if hasattr(part, "fp32_precision")]


def _unless_mixed(read: Callable[[], T]) -> T | None:
    """Return a setting of the older way; None where the caller used the newer, and torch raises."""
    try:
        return read()
    except RuntimeError:
        return None


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for the copy to a GPU.

    The way there is pinned memory: a copy from any other is waited for.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copied(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
    """Return tensors of one device in main memory, and what waits until they are there.

    A GPU copies them on a stream of its own, beside what it is asked to compute next.
    """
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    if not devices:
        return [tensor.cpu() for tensor in tensors], lambda: None
    (device,) = devices
    stream = _copies(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        hosts = []
        for tensor in tensors:
            # Pinned, or the copy would be waited for, and at a fraction of the rate.
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            hosts.append(host.copy_(tensor, non_blocking=True))
            # Else its memory could be given to the next batch before it is copied.
            tensor.record_stream(stream)
        done = stream.record_event()
    return hosts, done.synchronize


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def memory_errors(device: torch.device, advice: str) -> Iterator[None]:
    """Turn a device's running out of memory into a UserError that says what to do.

    Args:
        device: The device.
        advice: What takes less, such as `lower batch_size (16)`.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in _CPU_IS_FULL):
            raise
        free = available_memory(device) / 1e9
        raise UserError(
            f"{device} ran out of memory ({free:.1f} GB of it are free now); {advice}"
        ) from error


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device; huge where nothing says.

    On a GPU that includes what torch has reserved and not given to a tensor.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return min(_machine_memory(), _cgroup_memory())


def _machine_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line[:13] == "MemAvailable:")
    except (OSError, StopIteration):  # not Linux: what is free, without what caches could give
        if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
            return 1 << 62
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _cgroup_memory() -> int:
    """Return what the container may still take: its limit less what it cannot give back."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62  # no container, or one without a limit, whose file says "max"
    return limit - used + int(stat.get("inactive_file", 0))
