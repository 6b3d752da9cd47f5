"""Features of both towers at every position, in one pass over the items of a split."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from vlmlayers.arguments import InOrder, Seed, Takes, checked, in_order
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.extraction import RecordOptions
from vlmlayers.features import LayerFeatures
from vlmlayers.manifests import Item, Manifest
from vlmlayers.models.devices import resolve_precision
from vlmlayers.models.modes import in_turn, on_cpu
from vlmlayers.models.nvjpeg import refuse_nvjpeg
from vlmlayers.models.options import ExtractOptions, Items, dataset_of, is_manifest
from vlmlayers.models.own_data import OwnData, own_data
from vlmlayers.models.recording import Recorder
from vlmlayers.models.vlm import VLM, LoadedModel
from vlmlayers.models.work import Texts, Work
from vlmlayers.options import takes, validated
from vlmlayers.prompts import PROMPTED, UNGIVEN, UNTOLD, remarks_on
from vlmlayers.words import counted

LOG = logging.getLogger(__name__)


NamesInOrder = Annotated[Sequence[str], Takes("strings in the order of labels", convert=in_order)]
_LOOKED_AT = 8  # images that are in memory
# Of prepared tensors, a share of values may be beyond white: bicubic resizing of floats overshoots.
_OVERSHOOT, _FEW = 0.02, 0.01
_MADE_BY = {"open_clip": "open_clip_torch", "timm": "timm", "transformers": "transformers"}


@on_cpu()
@takes(RecordOptions)
@checked
def extract(
    model: LoadedModel,
    data: Any,
    split: str = "train",
    *,
    labels: InOrder | None = None,
    class_names: NamesInOrder | None = None,
    texts: InOrder | None = None,
    name: str | None = None,
    items: Items | None = None,
    root: str | Path | None = None,
    out: str | Path | None = None,
    template: str | None = None,
    seed: Seed = 0,
    progress: bool = True,
    **options: Any,
) -> LayerFeatures:
    """Record every position of both towers for the items of a split.

    Spaces of attention add what it does in each block, (item, head), as shares of uniform
    attention. The pooling `tokens` keeps every token, (item, token, width): to look at, not to
    score. Batch size and decoding are part of a store's identity: one fixes rounding, the other
    changes pixels: `reduced` decodes a JPEG at the smallest scale whose sides the model can use,
    `nvjpeg` on the CUDA device, where few cores would keep it waiting.
    Features are float32 in every precision. The log says how many images were left out.

    Args:
        model: What `load_model` returns.
        data: A `Manifest`, its name, or a path of one or of a folder of images; or data in memory:
            a list of PIL images, paths, arrays (height, width[, channel]) or (image, label) pairs,
            for `captions` (image, caption) or (image, captions) pairs; an array (image, height,
            width, channel); a torch `Dataset`, or the `DataLoader` of one; torchvision's
            `ImageFolder`; a `datasets.Dataset` of Hugging Face. Floating tensors count as prepared
            for the model; all else is prepared as the model wants it.
        split: `train`, `val` or `test`; only a name in tables for data in memory.
        labels: (image,) classes of images in memory: numbers from 0, or names.
        class_names: Their names by label; where None what the data say, of labels of their own.
        texts: Texts as they are: one per class where `text` is `prompts`; for images in memory and
            `captions` one, or several, per image.
        name: Name of data in memory in tables.
        items: A number of items to draw with balanced classes, a list of items, or None for all.
        root: Data root; see `Manifest`.
        out: Folder of the feature store; extraction resumes there. None keeps all in memory.
        template: Prompt with `{}` for the class name; the manifest's common one where None.
        seed: Seed of the draw where `items` is a number.
        progress: Show a progress bar.
        **options: Those of `RecordOptions`.

    Returns:
        Features of images and texts; rows follow the items.

    Raises:
        UserError: No items, items of other classes than the data's, or some without a class,
            unreadable images, NaN or Inf features, a store of another identity, or any argument
            that names nothing known.
    """
    captioned = options.get("text") == "captions"
    captions = texts if captioned else None
    manifest = _manifest(data, labels, class_names, name, captions, progress, captioned)
    own: dict[str, Any] = {
        "items": items, "root": root, "template": template, "seed": seed, "progress": progress,
    }  # fmt: skip
    own["texts"] = None if captions else texts
    asked = validated(ExtractOptions, {**own, **options}, "extract")
    with in_turn(model.clip):
        work, header, identity = prepare(model, manifest, split, asked)
        if out is None:
            return work.in_memory(header, identity)
        refuse_hooks(model)
        return work.on_disk(Path(out), header, identity)


def prepare(
    model: VLM, manifest: Any, split: str, options: ExtractOptions
) -> tuple[Work, dict[str, Any], dict[str, Any]]:
    """Return the work of an extraction, what its features say of themselves, and its identity.

    Errors are those of `extract`.
    """
    precision = resolve_precision(options.precision, model.device)
    options = options.model_copy(update={"precision": precision})
    if options.decoding != "full" and not isinstance(manifest, Manifest):
        raise UserError(
            f"decoding {options.decoding} is for datasets on disk; images in memory are decoded "
            "already: give a name, a TOML file or a folder, or leave decoding out"
        )
    if isinstance(manifest, OwnData):
        for name in ("root", "present_only"):
            if getattr(options, name):
                raise UserError(f"{name} is for datasets on disk; images in memory have none of it")
    if model.trained_on == manifest.name and split in ("train", "all"):
        LOG.warning(
            "the adapter of %s was trained on images of %s: on its split %s features tell apart "
            "what was learned by heart; val or test shows what the adapter does",
            model.weights, manifest.name, split,
        )  # fmt: skip
    items = _items(manifest, split, options)
    if options.decoding == "nvjpeg":
        refuse_nvjpeg(model, manifest, items, options.root)
    names = tuple(manifest.class_names(options.root))
    _refuse_some_unlabelled(manifest, items)
    if isinstance(options.items, Sequence):
        _refuse_relabelled(manifest, items, names)
    recorders = {
        tower: Recorder(model.towers[tower], options.spaces, options.pooling.get(tower))
        for tower in _towers(model, manifest, options)
    }
    texts = _texts(manifest, items, names, options) if "text" in recorders else None
    _check_prepared(model, manifest, items)
    work = Work(model, manifest, split, items, texts, recorders, options)
    header = {
        "model": model.name,
        "weights": model.weights,
        "dataset": manifest.name,
        "split": split,
        "class_names": names,
        "random_weights": model.random_weights,
    }
    return work, header, identity_of(work)


def refuse_textless(model: VLM, manifest: Any, items: Sequence[Item], **options: Any) -> None:
    """Refuse a dataset without what texts are made of, before others are extracted.

    Raises:
        UserError: It has no classes to make prompts of, or no captions.
    """
    asked = validated(ExtractOptions, {**options, "items": items}, "extract")
    if "text" in _towers(model, manifest, asked):
        _texts(manifest, items, tuple(manifest.class_names(asked.root)), asked)


def _manifest(
    data: Any,
    labels: Collection[Any] | None,
    class_names: Sequence[str] | None,
    name: str | None,
    captions: Collection[Any] | None,
    progress: bool,
    captioned: bool,
) -> Any:
    """Return the dataset of any data.

    Raises:
        UserError: The object is not a dataset, or states itself what was given beside it.
    """
    if not isinstance(data, str | os.PathLike) and not is_manifest(data):
        return own_data(data, labels, class_names, name, captions, progress, captioned)
    beside = {"labels": labels, "class_names": class_names, "name": name, "captions": captions}
    for what, given in beside.items():
        if given is not None:
            raise UserError(f"extract: a dataset says its {what} itself; leave it out")
    return dataset_of(data)


def _check_prepared(model: VLM, manifest: Any, items: Sequence[Any]) -> None:
    """Refuse tensors of another model's shape; warn of those of another preparation, or none."""
    if not isinstance(manifest, OwnData):
        return
    first, wanted = manifest.open_image(items[0]), model.towers["vision"].example(1).shape[1:]
    if not isinstance(first, torch.Tensor):
        return
    if first.shape != wanted:
        raise UserError(
            f"floating tensors count as prepared for the model, which takes {tuple(wanted)}; these "
            f"have shape {tuple(first.shape)}: prepare them with model.preprocess, or give pixels"
        )
    side = wanted[-1], wanted[-2]
    black, white = (model.preprocess(Image.new("RGB", side, grey)) for grey in ("black", "white"))
    if not isinstance(black, torch.Tensor) or not isinstance(white, torch.Tensor):
        return
    # A few images: of those that are prepared, hardly one has no pixel below the mean.
    images = map(manifest.open_image, items[:_LOOKED_AT])
    several = torch.stack([x.float() for x in images if getattr(x, "shape", ()) == wanted])
    slack = _OVERSHOOT * (white - black).abs()
    outside = (several < black - slack) | (several > white + slack)
    why = ""
    if black.min() < 0 <= several.min():
        why = (
            "no value of the tensors is below 0, as ToTensor leaves pixels, and floating tensors "
            "count as prepared, with the model's mean taken off"
        )
    elif outside.float().mean() > _FEW:
        why = (
            f"the tensors hold values from {several.min():.2f} to {several.max():.2f}, and the "
            f"model's own preparation makes {black.min():.2f} of black and {white.max():.2f} of "
            "white: they were prepared with another mean or deviation"
        )
    if why:
        LOG.warning(
            "%s: %s; prepare them with model.preprocess, or give PIL images or arrays",
            manifest.name, why,
        )  # fmt: skip


def _towers(model: VLM, manifest: Any, options: ExtractOptions) -> tuple[str, ...]:
    """Return the towers to record.

    Raises:
        UserError: The model has none of that name, or a template is for classes without names.
    """
    if options.tower is None:
        unnamed = isinstance(manifest, OwnData) and not manifest.named and options.texts is None
        if unnamed and options.text == "prompts" and "text" in model.towers:
            if options.template is not None:
                raise UserError(
                    f"template makes prompts of class names, and {manifest.name} has none; give "
                    "class_names="
                )
            LOG.warning("%s: no text features; give class_names= or texts=", manifest.name)
            return ("vision",)
        return tuple(model.towers)
    check_one_of("tower", options.tower, tuple(model.towers), where=f"model {model.name}")
    return (options.tower,)


def refuse_hooks(model: VLM) -> None:
    """Refuse to store features of a model with hooks, which its identity does not know of.

    An adapter that is attached permanently (`VLM.adapter_hash`) is part of the identity.

    Raises:
        UserError: Names the first module with a hook, such as an attached adapter.
    """
    if model.adapter_hash:
        return
    for name, module in model.clip.named_modules():
        # Hooks can change what passes, and nothing about them can be compared later.
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError(
                f"{name or 'the model'} has a hook (an attached adapter?) that the identity of a "
                "feature store does not know of; detach it, keep the features in memory, or give "
                "the adapter's file with --adapter"
            )


def _items(manifest: Any, split: str, options: ExtractOptions) -> list[Any]:
    items, root = options.items, options.root
    present = {"present_only": True} if options.present_only else {}
    if items is None:
        found = list(manifest.items(split, root=root, **present))
    elif isinstance(items, int):
        found = list(manifest.sample(split, items, seed=options.seed, root=root, **present))
    else:
        found = manifest.present(items, root, split) if present else list(items)
        if isinstance(manifest, OwnData):
            manifest.refuse_others(found)
    if not found:
        raise UserError(f"{manifest.name} has no items in split {split!r}")
    return found


def _refuse_some_unlabelled(manifest: Any, items: Sequence[Item]) -> None:
    """Refuse items without a class among others, before any is encoded: features hold no such."""
    without = [item.path for item in items if item.label < 0]
    if 0 < len(without) < len(items):
        raise UserError(
            f"{manifest.name}: {len(without):,} of {counted(len(items), 'item')} have no class, "
            f"first {without[0]}; give them one, or leave them out of the dataset"
        )


def _refuse_relabelled(manifest: Any, items: Sequence[Item], names: Sequence[str]) -> None:
    """Refuse items whose labels count other classes than the dataset's: prompts are by label."""
    for item in items:
        known = names[item.label] if 0 <= item.label < len(names) else "none"
        if item.class_name not in ("", known):
            raise UserError(
                f"items are labelled by other classes than those of {manifest.name}: "
                f"{item.path} of {item.class_name!r} has the label {item.label}, which is "
                f"{known!r} there; give items as its manifest lists them"
            )


def _texts(
    manifest: Any, items: Sequence[Any], names: Sequence[str], options: ExtractOptions
) -> Texts:
    if options.texts is not None:
        if len(options.texts) != len(names):
            raise UserError(
                f"{counted(len(options.texts), 'text')}, but {manifest.name} has "
                f"{counted(len(names), 'class')}; give one per class, or one per image with "
                "text='captions'"
            )
        return Texts(
            options.text, tuple(options.texts), np.arange(len(names), dtype=np.int64), template=""
        )
    if options.text == "prompts":
        pattern = options.template or manifest.template
        if not names:
            raise UserError(f"{manifest.name} has no classes{PROMPTED}")
        # A manifest has said it where its items were listed.
        for remark in remarks_on(names) if isinstance(manifest, OwnData) else ():
            LOG.warning("%s: %s", manifest.name, remark)
        prompts = tuple(manifest.prompt(name, pattern) for name in names)
        return Texts(options.text, prompts, np.arange(len(names), dtype=np.int64), pattern)
    rows = [(row, caption) for row, item in enumerate(items) for caption in item.captions]
    if not rows:
        own = isinstance(manifest, OwnData)
        raise UserError(f"{manifest.name} {UNGIVEN if own else UNTOLD}")
    pairs = np.array([row for row, _ in rows], dtype=np.int64)
    labels = np.array([items[row].label for row, _ in rows], dtype=np.int64)
    return Texts(options.text, tuple(caption for _, caption in rows), labels, "", pairs)


def identity_of(work: Work) -> dict[str, Any]:
    """Return all that feature values depend on, as JSON values."""
    recorders, texts = work.recorders, work.texts
    tokens = "" if texts is None else work.model.tokens_mark(texts.texts)
    families = ["open_clip", "timm", *(r.tower.family.split()[0] for r in recorders.values())]
    return {
        **work.model.identity(),
        "precision": work.options.precision,
        # Stores of full images do not name it: those made before there was a choice stay good.
        **({} if work.options.decoding == "full" else {"decoding": work.options.decoding}),
        "pooling": {name: recorder.pooling for name, recorder in recorders.items()},
        "joint_pooling": {name: recorder.joint_pooling for name, recorder in recorders.items()},
        "spaces": list(dict.fromkeys(s for r in recorders.values() for s in r.spaces)),
        # Kernels sum in another order at another batch size: the last bits differ.
        "batch_size": work.options.batch_size,
        "dataset": work.manifest.name,
        "split": work.split,
        "data": work.data.summary(),
        "items_hash": work.data.listed,
        **({} if texts is None else texts.identity()),
        **({"tokens": tokens} if tokens else {}),
        "versions": {
            "torch": torch.__version__,
            **{name: version(package) for name, package in _MADE_BY.items() if name in families},
        },
    }
