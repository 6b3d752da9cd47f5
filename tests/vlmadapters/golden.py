"""Replay recorded runs of public implementations: `python tests/vlmadapters/golden.py FILE.npz …`

Each file is rebuilt on its own backbone, its recorded start is loaded, its steps are replayed, and
for every variant the largest difference of each quantity is printed beside its tolerance. The exit
status is 0 where all lie within. Beside FILE.npz lies FILE.json, which says what it holds; how to
replay a method's files stands in the module of `replays` that `REPLAYS` names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

HERE = Path(__file__).resolve().parent
for folder in (HERE, *(HERE.parents[1] / name for name in ("analysis", "adapters"))):
    sys.path.append(str(folder))

from vlmadapters.clip.frozen import Backbone  # noqa: E402
from vlmadapters.clip.savings import Savings  # noqa: E402
from vlmadapters.clip.walk import State  # noqa: E402
from vlmadapters.methods.base import Method  # noqa: E402

# Method as its file names it, to the module of `replays` that knows the layout of the file.
REPLAYS: dict[str, str] = {
    "coop": "contexts",
    "cocoop": "contexts",
    "kgcoop": "contexts",
    "proda": "contexts",
    "ivlp": "variants",
    "lasp": "variants",
    "maple": "variants",
    "rpo": "variants",
    "clipadapter": "mains",
    "cliplora": "mains",
    "lweib": "mains",
    "promptsrc": "mains",
    "tipadapter, tipadapterf": "tip",
}
# Tolerances in single precision; gradients relative to the largest entry of each.
TOLERANCES = {
    "logits": 1e-5,
    "loss parts": 1e-5,
    "gradients": 1e-4,
    "losses": 1e-5,
    "final parameters": 1e-4,
    "final logits": 1e-4,
}


@dataclass(frozen=True)
class Check:
    """The largest difference of one quantity of one variant."""

    variant: str
    quantity: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.difference <= self.tolerance


class Recording:
    """A recorded run: arrays by key, and what its JSON says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: dict[str, Any] = json.loads(path.with_suffix(".json").read_text("utf-8"))
        self.arrays = np.load(path, allow_pickle=False)
        elsewhere = self.info.get("state")  # of an extract that shares its tower
        self.state = self.group("state/")
        if elsewhere:
            shared = np.load(path.with_name(elsewhere), allow_pickle=False)
            self.state = {k.removeprefix("state/"): torch.from_numpy(v) for k, v in shared.items()}

    def __contains__(self, key: str) -> bool:
        return key in self.arrays.files

    def tensor(self, key: str) -> Tensor:
        """Return one array."""
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays whose key starts with a prefix, by the rest of it."""
        keys = [key for key in self.arrays.files if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.tensor(key) for key in keys}

    @property
    def has_texts(self) -> bool:
        """Whether the text tower is recorded; an extract may hold features of texts alone."""
        return "text_projection" in self.state

    def images(self, backbone: Backbone, method: Method, key: str, *index: Any) -> State:
        """Return the state of recorded images at the first block that a method changes.

        Where the method changes no vision block, an extract holds their features instead.

        Args:
            backbone: What `backbone` returned.
            method: The method.
            key: The images.
            index: Which of them.
        """
        kind, start = next(backbone.clip.parameters()).dtype, method.first(backbone, "vision")
        if f"features/{key}" in self:
            x = self.tensor(f"features/{key}")[index].to(kind)
            return State(x, x, start, finished=True)
        return backbone.images(self.tensor(key)[index].to(kind), [start])[start]

    @cached_property
    def clip(self) -> CLIP:
        """The recorded backbone, frozen."""
        clip = CLIP(**self.info["model_cfg"])
        clip.load_state_dict(self.state, strict=False)
        return clip.eval().requires_grad_(False)

    def backbone(self, savings: Savings | None = None) -> Backbone:
        """Return the recorded backbone taken apart, with all savings by default."""
        return Backbone(self.clip, savings, SimpleTokenizer())


def largest(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return (
        float((found.detach().double() - expected.double()).abs().max()) if found.numel() else 0.0
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest entry expected."""
    return largest(found, expected) / max(float(expected.abs().max()), 1e-12)


def worst(differences: Iterable[float]) -> float:
    """Return the largest difference; NaN, which `max` may pass over, where one is."""
    return float(np.max([*differences]))


def replay(path: Path) -> Iterator[Check]:
    """Yield the checks of one file."""
    recording = Recording(path)
    name = recording.info.get("method", "such").lower().replace("-", "").replace("_", "")
    if name not in REPLAYS:
        sys.exit(f"{path}: no replay of {name} files; known are {'; '.join(sorted(REPLAYS))}")
    module = import_module(f"replays.{REPLAYS[name]}")
    yield from module.replay(recording)


def main(paths: list[str]) -> int:
    """Replay files, print a line for each check, return the exit status."""
    torch.set_num_threads(1)
    failed = 0
    for path in map(Path, paths):
        checks = [*replay(path)]
        if not checks:
            sys.exit(f"{path}: no run is recorded in it")
        for check in checks:
            mark = "ok  " if check.passed else "FAIL"
            failed += not check.passed
            print(
                f"{mark} {path.stem:18} {check.variant:24.24} {check.quantity:16} "
                f"{check.difference:9.1e} <= {check.tolerance:.0e}"
            )
    print(f"{failed} outside their tolerance" if failed else "all within their tolerances")
    return int(bool(failed))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("name the recorded files: golden.py FILE.npz …")
    sys.exit(main(sys.argv[1:]))
