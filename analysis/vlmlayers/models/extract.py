"""Features of both towers at every position, in one pass over the items of a split."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.models.decoding import Unreadable, batches_of, decode
from vlmlayers.models.load import PRECISIONS, VLM
from vlmlayers.models.recording import Features, Recorder
from vlmlayers.positions import TOWERS
from vlmlayers.progress import bar

TEXTS = ("prompts", "captions")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def extract(
    model: VLM, manifest: Any, split: str, *, items: int | Sequence[Any] | None = None,
    root: str | Path | None = None, spaces: Sequence[str] = ("native", "joint"),
    pooling: str | Mapping[str, str] | None = None, batch_size: int = 64, workers: int = 0,
    precision: str = "fp32", out: str | Path | None = None, text: str = "prompts",
    template: str | None = None, seed: int = 0, skip_unreadable: bool = False,
    progress: bool = True,
) -> LayerFeatures:
    """Record every position of both towers for the items of a split.

    Args:
        model: What `load_model` returns.
        manifest: The dataset.
        split: `train`, `val` or `test`.
        items: A number of items to draw with balanced classes, a list of items, or None for all.
        root: Data root; see `Manifest`.
        spaces: Among `native`, `normed`, `joint`.
        pooling: One pooling for both towers, one per tower, or None for each tower's own.
        batch_size: Items per forward pass; part of the store's identity, as it fixes rounding.
        workers: Decoding processes.
        precision: `fp32`, or autocast to `bf16` or `fp16`. Features are float32 in each case.
        out: Folder of the feature store; extraction resumes there. None keeps all in memory.
        text: `prompts` (one per class) or `captions` (all of each image, with pairs).
        template: Prompt with `{}` for the class name; the manifest's common one where None.
        seed: Seed of the draw where `items` is a number.
        skip_unreadable: Leave unreadable images out instead of stopping.
        progress: Show a progress bar.

    Returns:
        Features of images and texts; rows follow the items.

    Raises:
        UserError: No items, unreadable images, NaN or Inf features, a store of another identity,
            or any argument that names nothing known.
    """
    check_one_of("precision", precision, PRECISIONS)
    check_one_of("text", text, TEXTS)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it has to be at least 1")
    place = None if root is None else Path(root)
    chosen = _items(manifest, split, items, place, seed)
    names = tuple(manifest.class_names(place))
    texts = _texts(manifest, chosen, names, text, template)
    recorders = {
        tower: Recorder(model.towers[tower], spaces, pooling_of(pooling, tower))
        for tower in TOWERS
    }
    run = _Run(model, precision, batch_size, workers, skip_unreadable, progress)
    vision = run.images(recorders["vision"], manifest, split, chosen, place)
    words = run.texts(recorders["text"], texts)
    return LayerFeatures(
        model=model.name, weights=model.weights, dataset=manifest.name, split=split,
        class_names=names, vision=vision, text=words, random_weights=model.random_weights,
        identity=identity_of(
            model, manifest, split, chosen, texts, recorders, batch_size, precision
        ),
    )


@dataclass(frozen=True)
class Texts:
    """The texts of one extraction: prompts by class, or captions by image."""

    kind: str
    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    template: str
    pairs: NDArray[np.int64] | None = None


def pooling_of(pooling: str | Mapping[str, str] | None, tower: str) -> str | None:
    """Return the pooling asked for one tower."""
    if pooling is None or isinstance(pooling, str):
        return pooling
    for name in pooling:
        check_one_of("tower", name, TOWERS, where="pooling")
    return pooling.get(tower)


def _items(
    manifest: Any, split: str, items: int | Sequence[Any] | None, root: Path | None, seed: int
) -> list[Any]:
    check_one_of("split", split, ("train", "val", "test"))
    if items is None:
        found = list(manifest.items(split, root=root))
    elif isinstance(items, int):
        found = list(manifest.sample(split, items, seed=seed, root=root))
    else:
        found = list(items)
    if not found:
        raise UserError(f"{manifest.name} has no items in split {split!r}")
    return found


def _texts(
    manifest: Any, items: Sequence[Any], names: Sequence[str], kind: str, template: str | None
) -> Texts:
    if kind == "prompts":
        pattern = manifest.template if template is None else template
        if "{}" not in pattern:
            raise UserError(f"template {pattern!r} has no {{}} where the class name goes")
        prompts = tuple(pattern.replace("{}", name) for name in names)
        return Texts(kind, prompts, np.arange(len(names), dtype=np.int64), pattern)
    rows = [(row, caption) for row, item in enumerate(items) for caption in item.captions]
    if not rows:
        raise UserError(f"{manifest.name} has no captions; use text='prompts'")
    pairs = np.array([row for row, _ in rows], dtype=np.int64)
    labels = np.array([items[row].label for row, _ in rows], dtype=np.int64)
    return Texts(kind, tuple(caption for _, caption in rows), labels, "", pairs)


def identity_of(
    model: VLM, manifest: Any, split: str, items: Sequence[Any], texts: Texts,
    recorders: Mapping[str, Recorder], batch_size: int, precision: str,
) -> dict[str, Any]:
    """Return all that feature values depend on, as JSON values."""
    order = sha256()
    for item in items:
        order.update(f"{item.path}\0{item.label}\n".encode())
    words = sha256("\n".join(texts.texts).encode())
    return {
        "model": model.name, "weights": model.weights, "weights_hash": model.weights_hash,
        "preprocessing": dict(model.preprocess_config), "precision": precision,
        "weights_precision": model.precision, "device": model.device.type,
        "pooling": {name: recorder.pooling for name, recorder in recorders.items()},
        "joint_pooling": {name: recorder.joint_pooling for name, recorder in recorders.items()},
        "spaces": list(next(iter(recorders.values())).spaces), "batch_size": batch_size,
        "dataset": manifest.name, "manifest_hash": manifest.hash, "split": split,
        "items": len(items), "items_hash": order.hexdigest(), "text": texts.kind,
        "template": texts.template, "texts_hash": words.hexdigest(),
        "versions": {
            "torch": torch.__version__, "open_clip": version("open_clip_torch"),
            "timm": version("timm"), "python": platform.python_version(),
        },
    }


@dataclass
class _Run:
    model: VLM
    precision: str
    batch_size: int
    workers: int
    skip_unreadable: bool
    progress: bool

    def images(
        self, recorder: Recorder, manifest: Any, split: str, items: Sequence[Any],
        root: Path | None,
    ) -> TowerFeatures:
        unreadable = Unreadable()
        rows = _Rows(len(items))
        stream = decode(
            manifest, items, batches_of(len(items), self.batch_size), root=root,
            preprocess=self.model.preprocess, size=self.model.image_size, workers=self.workers,
            unreadable=unreadable, pin=self.model.device.type == "cuda",
        )
        description = f"{manifest.name} {split} images"
        with recorder, bar(
            total=len(items), description=description, unit="image", show=self.progress
        ) as shown:
            for index, images in stream:
                if images is not None:
                    rows.put(index, self._record(recorder, images), recorder, items)
                shown.update(len(index))
                if unreadable.hopeless(shown.n + len(unreadable.reasons)):
                    break
        if not self.skip_unreadable:
            unreadable.check(manifest.name, len(items))
        kept = [row for row in range(len(items)) if row not in unreadable.reasons]
        if not kept:
            unreadable.check(manifest.name, len(items))
        labels = np.array([item.label for item in items], dtype=np.int64)
        whole = TowerFeatures(
            "vision", recorder.tower.depth, recorder.pooling, "images",
            tuple(item.path for item in items), labels, rows.arrays,
        )
        return whole if len(kept) == len(items) else whole.take(kept)

    def texts(self, recorder: Recorder, texts: Texts) -> TowerFeatures:
        rows = _Rows(len(texts.texts))
        with recorder:
            for index in batches_of(len(texts.texts), self.batch_size):
                ids = self.model.tokenizer([texts.texts[i] for i in index])
                rows.put(index, self._record(recorder, ids), recorder, texts.texts)
        return TowerFeatures(
            "text", recorder.tower.depth, recorder.pooling, texts.kind, texts.texts, texts.labels,
            rows.arrays, texts.pairs,
        )

    def _record(self, recorder: Recorder, batch: Tensor) -> Features:
        device = self.model.device
        batch = batch.to(device, non_blocking=True)
        if batch.is_floating_point():
            batch = batch.to(next(self.model.clip.parameters()).dtype)
        with autocast(device, self.precision):
            return recorder(batch)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return autocast to a precision, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


class _Rows:
    """Arrays of one tower in memory, filled batch by batch."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.arrays: dict[str, dict[str, NDArray[np.floating]]] = {}

    def put(
        self, rows: Sequence[int], features: Features, recorder: Recorder, items: Sequence[Any]
    ) -> None:
        for space, by_position in features.items():
            arrays = self.arrays.setdefault(space, {})
            for position, values in by_position.items():
                refuse_not_finite(values, rows, position, recorder, items)
                if position not in arrays:
                    arrays[position] = np.empty((self.total, values.shape[1]), np.float32)
                arrays[position][rows] = values


def refuse_not_finite(
    values: NDArray[np.floating], rows: Sequence[int], position: str, recorder: Recorder,
    items: Sequence[Any],
) -> None:
    """Stop at NaN or Inf features.

    Raises:
        UserError: Names tower, position and the first item.
    """
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        first = items[rows[int(np.argmax(bad))]]
        raise UserError(
            f"NaN or Inf in {recorder.tower.name} features at {position}, {int(bad.sum())} of "
            f"{len(rows)} items in the batch, first {getattr(first, 'path', first)!r}; try "
            "precision fp32, and check the weights"
        )
