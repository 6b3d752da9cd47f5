"""A checksum over tensors and plain values, so that a flipped bit on a disk does not go unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def content_checksum(content: Any) -> str:
    """Return SHA-256 over nested dictionaries, lists, tensors, numbers and texts.

    Neither torch's zip files nor safetensors keep one that is compared on reading.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, content: Any) -> None:
    if isinstance(content, Tensor):
        whole = content.detach().cpu().contiguous()
        digest.update(f"tensor {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(content, Mapping):
        digest.update(f"mapping {len(content)}\n".encode())
        for key in sorted(content, key=repr):
            _add(digest, key)
            _add(digest, content[key])
    elif isinstance(content, (list, tuple)):
        digest.update(f"list {len(content)}\n".encode())
        for value in content:
            _add(digest, value)
    else:
        text = repr(content).encode("utf-8", "surrogatepass")
        digest.update(f"value {len(text)}\n".encode() + text + b"\n")
