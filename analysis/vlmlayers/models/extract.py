"""Features of both towers at every position, in one pass over the items of a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmlayers.errors import UserError, check_one_of
from vlmlayers.features import LayerFeatures
from vlmlayers.models.load import PRECISIONS, VLM
from vlmlayers.models.recording import Recorder
from vlmlayers.models.work import Texts, Work
from vlmlayers.positions import TOWERS

TEXTS = ("prompts", "captions")


def extract(
    model: VLM,
    manifest: Any,
    split: str,
    *,
    items: int | Sequence[Any] | None = None,
    root: str | Path | None = None,
    spaces: Sequence[str] = ("native", "joint"),
    pooling: str | Mapping[str, str] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    precision: str = "fp32",
    out: str | Path | None = None,
    text: str = "prompts",
    template: str | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
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
    work, header, identity = prepare(
        model,
        manifest,
        split,
        items=items,
        root=root,
        spaces=spaces,
        pooling=pooling,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        text=text,
        template=template,
        seed=seed,
        skip_unreadable=skip_unreadable,
        progress=progress,
    )
    if out is None:
        return work.in_memory(header, identity)
    refuse_hooks(model)
    return work.on_disk(Path(out), header, identity)


def prepare(
    model: VLM,
    manifest: Any,
    split: str,
    *,
    items: int | Sequence[Any] | None,
    root: str | Path | None,
    spaces: Sequence[str],
    pooling: str | Mapping[str, str] | None,
    batch_size: int,
    workers: int,
    precision: str,
    text: str,
    template: str | None,
    seed: int,
    skip_unreadable: bool,
    progress: bool,
) -> tuple[Work, dict[str, Any], dict[str, Any]]:
    """Return the work of an extraction, what its features say of themselves, and its identity.

    Arguments and errors are those of `extract`.
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
        tower: Recorder(model.towers[tower], spaces, pooling_of(pooling, tower)) for tower in TOWERS
    }
    identity = identity_of(model, manifest, split, chosen, texts, recorders, batch_size, precision)
    header = {
        "model": model.name,
        "weights": model.weights,
        "dataset": manifest.name,
        "split": split,
        "class_names": list(names),
        "random_weights": model.random_weights,
    }
    work = Work(
        model,
        manifest,
        split,
        chosen,
        texts,
        recorders,
        place,
        batch_size,
        workers,
        precision,
        skip_unreadable,
        progress,
    )
    return work, header, identity


def refuse_hooks(model: VLM) -> None:
    """Refuse to store features of a model with hooks, which its identity does not know of.

    An adapter that is attached for good (`VLM.adapter_hash`) is part of the identity.

    Raises:
        UserError: Names the first module with a hook, such as an attached adapter.
    """
    if model.adapter_hash:
        return
    for name, module in model.clip.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError(
                f"{name or 'the model'} has a hook (an attached adapter?) that the identity of a "
                "feature store does not know of; detach it, keep the features in memory, or give "
                "the adapter's file with --adapter"
            )


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
        if not names:
            raise UserError(
                f"{manifest.name} has no classes to make prompts of; use "
                "text='captions' (--text captions)"
            )
        prompts = tuple(manifest.prompt(name, pattern) for name in names)
        return Texts(kind, prompts, np.arange(len(names), dtype=np.int64), pattern)
    rows = [(row, caption) for row, item in enumerate(items) for caption in item.captions]
    if not rows:
        raise UserError(f"{manifest.name} has no captions; use text='prompts'")
    pairs = np.array([row for row, _ in rows], dtype=np.int64)
    labels = np.array([items[row].label for row, _ in rows], dtype=np.int64)
    return Texts(kind, tuple(caption for _, caption in rows), labels, "", pairs)


def identity_of(
    model: VLM,
    manifest: Any,
    split: str,
    items: Sequence[Any],
    texts: Texts,
    recorders: Mapping[str, Recorder],
    batch_size: int,
    precision: str,
) -> dict[str, Any]:
    """Return all that feature values depend on, as JSON values."""
    order = sha256()
    for item in items:
        order.update(f"{item.path}\0{item.label}\n".encode())
    words = sha256("\n".join(texts.texts).encode())
    return {
        "model": model.name,
        "weights": model.weights,
        "weights_hash": model.weights_hash,
        "preprocessing": dict(model.preprocess_config),
        "precision": precision,
        "weights_precision": model.precision,
        "device": model.device.type,
        "pooling": {name: recorder.pooling for name, recorder in recorders.items()},
        "joint_pooling": {name: recorder.joint_pooling for name, recorder in recorders.items()},
        "spaces": list(next(iter(recorders.values())).spaces),
        "batch_size": batch_size,
        "dataset": manifest.name,
        "manifest_hash": manifest.hash,
        "split": split,
        "items": len(items),
        "items_hash": order.hexdigest(),
        "text": texts.kind,
        "template": texts.template,
        "texts_hash": words.hexdigest(),
        "versions": {
            "torch": torch.__version__,
            "open_clip": version("open_clip_torch"),
            "timm": version("timm"),
        },
    }
