"""Export of a trained method for other code: merged into its backbone, or as a classifier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from vlmadapters.clip.frozen import Backbone
from vlmadapters.data.task import Task
from vlmadapters.files import OURS, load_method, read_info, save_official
from vlmadapters.methods.base import Method
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import atomically
from vlmlayers.models.vlm import VLM

FORMS = ("merged", "classes", "official")
_ROUNDING = 1e-3  # of the largest logit: what products of another shape may differ by


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
        UserError: The method does not allow the form, the name of the file says another format, or
            a file cannot be read or written.
    """
    if form is not None:
        check_one_of("form", form, FORMS)
    elif classes is not None:
        form = "classes"
    method, info = load_method(adapter, model), read_info(adapter)
    told: dict[str, Any] = {
        "model": model.name,
        "weights": model.weights,
        "method": method.config.title,
    }
    for one in FORMS if form is None else (form,):
        try:
            if one == "merged":
                _write(Path(out), merged_weights(method, model), told)
            elif one == "classes":
                names = info.task.class_names if classes is None else tuple(classes)
                task = Task(names, info.task.template)
                told |= {"class_names": list(names)}
                _write(Path(out), class_embeddings(method, model, task), told)
            else:
                _check_name(out, method.config.title, safetensors=False)
                save_official(out, method)
            return one
        except CannotExport:
            if form is not None:
                raise
    raise AssertionError("the last form is every method's")


class CannotExport(UserError):
    """A method does not allow a form of export."""


def merged_weights(method: Method, model: VLM) -> dict[str, Tensor]:
    """Return the state dict of a backbone with a method merged into its weights.

    Its features are those of the adapted model up to rounding.

    Raises:
        CannotExport: The method computes something that no weights of the backbone give.
    """
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    changed = method.merged(backbone)
    if not changed:
        raise CannotExport(
            f"{method.config.title} computes beside the backbone's weights, so that it cannot be "
            "merged into them; test it with `vlmlayers evaluate --adapter`, or export classes or "
            "its authors' layout (form='classes', 'official'; --form)"
        )
    state = {key: value.detach().cpu().clone() for key, value in model.clip.state_dict().items()}
    # In the backbone's own precision, from which a half-precision CLIP was widened to compute.
    return state | {key: changed[key].to("cpu", state[key].dtype) for key in changed}


def class_embeddings(method: Method, model: VLM, task: Task) -> dict[str, Tensor]:
    """Return a method's classifier for the backbone's own image features.

    Returns:
        `class_embeddings`, (class, joint), and `scale`: the logits of an image are scale × the
        products of its feature, at length 1, with them.

    Raises:
        CannotExport: The method changes image features, or its logits are no products.
    """
    backbone = Backbone(model.clip, tokenizer=model.tokenizer)
    depth = backbone.vision.tower.depth
    refused = CannotExport(
        f"{method.config.title} changes more than the classes' embeddings, which alone would be no "
        "classifier; test it with `vlmlayers evaluate --adapter`, or export its authors' layout "
        "(form='official', --form official)"
    )
    # Either way image features would differ from those of the backbone that the file is for.
    own_images = type(method).image_features is not Method.image_features
    if own_images or method.start("vision", depth) <= depth:
        raise refused
    generator = torch.Generator().manual_seed(0)
    probe = F.normalize(torch.randn(4, backbone.joint, generator=generator), dim=-1)
    with torch.no_grad():
        found = method.class_features(backbone, method.prepare(backbone, task))
        if not isinstance(found, Tensor) or found.shape != (len(task.class_names), backbone.joint):
            raise refused
        # Logits of the axes are the classifier, if any other image gets what it then gives.
        axes = torch.eye(backbone.joint, device=backbone.device)
        rows = method.logits(backbone, axes, found).float().T  # (class, joint)
        given = method.logits(backbone, probe.to(backbone.device), found).float()
        if (given - probe.to(rows) @ rows.T).abs().max() > _ROUNDING * given.abs().max():
            raise refused
        clip: Any = backbone.clip
        scale = clip.logit_scale.exp().float()
    return {"class_embeddings": (rows / scale).cpu().clone(), "scale": scale.cpu().clone()}


def _check_name(path: str | Path, title: str, *, safetensors: bool) -> None:
    """Refuse a file whose name says another format than it gets: readers go by the name."""
    path = Path(path)
    if (path.suffix == OURS) == safetensors:
        return
    if safetensors:
        raise UserError(f"{path}: {title} is written as safetensors; name the file *{OURS}")
    raise UserError(
        f"{path}: {title} can be written in its authors' layout alone, a torch file; name it "
        f"{path.stem}.pth.tar"
    )


def _write(path: Path, state: dict[str, Tensor], told: dict[str, Any]) -> None:
    _check_name(path, told["method"], safetensors=True)
    # safetensors refuses tensors that are not contiguous, as transposed ones are.
    whole = {key: value.contiguous() for key, value in state.items()}
    data = save(whole, metadata={"description": json.dumps(told)})
    atomically(path, lambda part: part.write_bytes(data))
