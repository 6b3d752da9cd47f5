"""Export of a trained method for other code: merged into its backbone, or as a classifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task
from vlmadapters.device import own_modes
from vlmadapters.files import load_method, read_info, save_whole, write_tensors
from vlmadapters.methods.base import Method
from vlmadapters.methods.config import OURS, UNMERGED
from vlmlayers.arguments import checked
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.models.vlm import VLM
from vlmlayers.prompts import alike

FORMS = ("merged", "classes", "official")
_ROUNDING = 1e-3  # of the largest logit: what products of another shape may differ by


@own_modes()
@checked
def export(
    adapter: str | Path,
    model: VLM,
    out: str | Path,
    *,
    form: str | None = None,
    classes: Sequence[str] | None = None,
) -> str:
    """Write a trained method in a form that needs no code of ours.

    Args:
        adapter: `.safetensors` that `vlmlayers train` wrote.
        model: The backbone that it was trained on.
        out: The file: `.safetensors`, or for `official` any other name, such as `.pth.tar`.
        form: `merged`, a state dict of the backbone's architecture with the method in its weights;
            `classes`, the embeddings of classes for the backbone's own image features, with scale
            and names; `official`, the authors' layout. None takes the first that the method allows.
        classes: Names for `classes`; those trained on where None.

    Returns:
        The form that was written.

    Raises:
        UserError: The method does not allow the form, which embeds no classes that are named, a
            class is named twice or not at all, the name of the file says another format or is that
            of the adapter, or a file cannot be read or written.
    """
    if form is not None:
        check_one_of("form", form, FORMS)
    if classes is not None:
        if form not in (None, "classes"):
            raise UserError(f"classes are embedded, and form {form!r} embeds none; leave one out")
        form = "classes"
        _check_classes(classes)
    method, info, out = load_method(adapter, model), read_info(adapter), Path(out)
    if out.exists() and out.samefile(adapter):
        raise UserError(f"{out} is the adapter itself, which would be lost; name another file")
    names = info.task.class_names if classes is None else tuple(classes)
    task, title = replace(info.task, class_names=names), method.config.title
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "merged": partial(merged_weights, method, model),
        "classes": partial(class_embeddings, method, model, task),
        "official": partial(_official, method),
    }
    refused: dict[str, str] = {}
    for one in FORMS if form is None else (form,):
        try:
            content = makers[one]()
        except CannotExport as error:
            refused[one] = str(error)
            continue
        _check_name(out, title, one)
        if one == "official":
            save_whole(out, content)
        else:
            told: dict[str, Any] = {"model": model.name, "weights": model.weights, "method": title}
            told |= {"class_names": list(names)} if one == "classes" else {}
            told |= {"image_size": image_size(model)} if one == "merged" else {}
            write_tensors(out, content, json.dumps(told))
        return one
    left = [one for one in FORMS if one not in refused and _allows(makers[one])]
    other = f"export it as {' or '.join(left)} (form=, --form), or " if left else ""
    more = "" if left else "; no form of export is left"
    raise CannotExport(
        f"{title} {', and '.join(refused.values())}{more}; {other}test it with `vlmlayers evaluate "
        "--adapter`"
    )


def image_size(model: VLM) -> list[int]:
    """Return height and width of the images that a model takes, which its weights do not say."""
    return list(model.towers["vision"].example(0).shape[-2:])


def _official(method: Method) -> dict[str, Any]:
    if not method.has_official_layout():
        raise CannotExport("has no layout of its authors")
    return method.official_content()


def _allows(make: Callable[[], Any]) -> bool:
    try:
        make()
    except CannotExport:
        return False
    return True


class CannotExport(UserError):
    """A method does not allow a form of export; the message goes on after the method's name."""


def merged_weights(method: Method, model: VLM) -> dict[str, Tensor]:
    """Return the state dict of a backbone with a method merged into its weights.

    Its features are those of the adapted model up to rounding.

    Raises:
        CannotExport: The method computes something that no weights of the backbone give.
    """
    backbone = Backbone(model.clip, tokenizer=model.tokenize)
    changed = method.merged(backbone)
    if not changed:
        raise CannotExport(UNMERGED)
    state = {key: value.detach().cpu().clone() for key, value in model.clip.state_dict().items()}
    # In the backbone's own precision, from which a half-precision CLIP was widened to compute.
    return state | {
        key: new.to("cpu", state[key].dtype).reshape(state[key].shape)
        for key, new in changed.items()
    }


def class_embeddings(method: Method, model: VLM, task: Task) -> dict[str, Tensor]:
    """Return a method's classifier for the backbone's own image features.

    Returns:
        `class_embeddings`, (class, joint), `scale`, and `bias` where the backbone has one, as
        SigLIP does: the logits of an image are scale × the products of its feature, at length 1,
        with them, + bias.

    Raises:
        CannotExport: The method changes image features, its logits are no products, or the task has
            no class.
    """
    backbone = Backbone(model.clip, tokenizer=model.tokenize)
    depth = backbone.vision.tower.depth
    refused = CannotExport("changes more than the classes' embeddings, no classifier by themselves")
    # Either way image features would differ from those of the backbone that the file is for.
    own_images = type(method).image_features is not Method.image_features
    if own_images or method.start("vision", depth) <= depth:
        raise refused
    if not task.class_names:
        raise CannotExport("was saved without its classes; name some (classes=, --classes)")
    generator = torch.Generator().manual_seed(0)
    probe = F.normalize(torch.randn(4, backbone.joint, generator=generator), dim=-1)
    clip: Any = backbone.clip
    bias = getattr(clip, "logit_bias", None)
    told = {} if bias is None else {"bias": bias.detach().float().cpu().clone()}
    with torch.no_grad():
        found = method.class_features(backbone, method.prepare(backbone, task))
        if not isinstance(found, Tensor) or found.shape != (len(task.class_names), backbone.joint):
            raise refused
        # Logits of the axes are the classifier, if any other image gets what it then gives.
        axes = torch.eye(backbone.joint, device=backbone.device)
        added = 0.0 if bias is None else bias.float()
        rows = (method.logits(backbone, axes, found).float() - added).T  # (class, joint)
        given = method.logits(backbone, probe.to(backbone.device), found).float() - added
        if (given - probe.to(rows) @ rows.T).abs().max() > _ROUNDING * given.abs().max():
            raise refused
        scale = clip.logit_scale.exp().float()
    return {"class_embeddings": (rows / scale).cpu().clone(), "scale": scale.cpu().clone(), **told}


def _check_classes(names: Sequence[str]) -> None:
    """Refuse names of classes of which a prediction could not be told."""
    if not names or not all(name.strip() for name in names):
        raise UserError("classes name no class, or an empty one; leave them out for those trained")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"classes name {name!r} {names.count(name)} times; name each once")
    for told in alike(names):
        raise UserError(f"{told}; name one of them")


def _check_name(path: Path, title: str, form: str) -> None:
    """Refuse a file whose name says another format than it gets: readers go by the name."""
    safetensors = form != "official"
    if (path.suffix == OURS) == safetensors:
        return
    if safetensors:
        raise UserError(
            f"{path}: {title} is written as safetensors in the form {form}; name the file *{OURS}"
        )
    raise UserError(
        f"{path}: {title} is written in its authors' layout, a torch file; name it "
        f"{path.stem}.pth.tar"
    )
