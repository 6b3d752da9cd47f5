"""Weights of a TorchScript archive, such as OpenAI ships, read without running what is in it.

The archive is a zip file: a pickle of the module tree, the tensors' bytes, and code. The pickle is
read with every name in it replaced by something inert of our own; the code is not looked at.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


def is_archive(path: Path) -> bool:
    """Return whether a file is a TorchScript archive; plain checkpoints have no constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """Return every tensor of an archive's modules by its dotted name.

    Raises:
        pickle.UnpicklingError: It holds something else than modules, numbers and tensors.
        zipfile.BadZipFile: It is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = min(names, key=len).removesuffix("data.pkl")
        return dict(_named(_Reader(archive, root).load(), ""))


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:  # torch compresses code only
        raise pickle.UnpicklingError(f"entry {name} is compressed")
    return archive.read(entry)


class _Module:
    """What stands for every module and object of the archive: its attributes, nothing else."""


class _Reader(pickle.Unpickler):
    """Reads the tree; no name in it is looked up anywhere but here."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_content(archive, f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("Module", (_Module,), {})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("collections", "OrderedDict"): self._empty,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch.jit._pickle":  # marks the type of a list
            return self._first
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a model's weights")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if key not in self._storages:
            # A copy that may be written to: torch warns of tensors over read-only bytes.
            content = bytearray(_content(self._archive, f"{self._root}data/{key}"))
            self._storages[key] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        # Sizes in the pickle are not to be trusted: `as_strided` would read past the end.
        if len(self._storages[key]) != count:
            raise pickle.UnpicklingError(f"storage {key} has another length than the tree says")
        return self._storages[key]

    def _tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        return storage.as_strided(tuple(size), tuple(stride), offset)

    def _first(self, value: Any, *_: Any) -> Any:
        return value

    def _empty(self) -> dict[str, Any]:
        return {}


def _named(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _named(value, f"{prefix}{name}.")
