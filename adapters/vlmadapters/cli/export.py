"""The verb `export` of the command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vlmadapters.cli.inputs import load_backbone
from vlmadapters.methods import BUILT_IN, METHODS
from vlmlayers.architectures import check_model
from vlmlayers.cli.options import Device, Model, several, with_options
from vlmlayers.errors import UserError, check_one_of, no_file
from vlmlayers.extraction import WeightsOptions
from vlmlayers.prompts import TEMPLATE
from vlmlayers.words import UNTRAINED

HARD = "\0"  # a space that no line ends at, as of a command to be copied
FORMS = {
    "merged": "load it as weights of the same architecture",
    "classes": "logits are scale × unit image features @ class_embeddings.T (+ bias, if any)",
    "official": "the layout of the method's authors",
}


@with_options
def export(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="Trained adapter, .safetensors of ours.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    weights: WeightsOptions,
    form: Annotated[
        str | None,
        typer.Option(
            help="merged: the backbone's weights with the method in them; classes: embeddings of "
            "classes; official: the authors' layout; the first that a method allows where absent.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None, several("Names of classes to embed; those trained on where absent.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Class of a method of your own, as my_method.py:Mine.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Write a trained adapter for code without this toolkit."""
    if form is not None:
        check_one_of("form", form, FORMS, where="--form")
    if classes is not None and form not in (None, "classes"):
        raise UserError(f"--classes are embedded, and --form {form} embeds none; leave one out")
    if not adapter.is_file():
        raise UserError(f"adapter {adapter} {no_file(adapter)}")
    if form == "merged":
        _refuse_unmergeable(adapter)
    check_model(model, **weights.arguments())
    if method is not None:
        METHODS.config(method)  # known from here on
    from vlmadapters.cli.terminal import wrapped
    from vlmadapters.export import export as write
    from vlmadapters.export import image_size

    loaded = load_backbone(model, weights, device)
    written = write(adapter, loaded, out, form=form, classes=classes)
    note = FORMS[written]
    if written == "merged" and weights.image_size is not None:
        sides = image_size(loaded)
        note += (
            f"\nits images are {sides[0]} × {sides[1]}: load it with --image-size "
            f"{','.join(map(str, sides))} (open_clip: force_image_size={tuple(sides)})"
        )
    if written == "official":
        note += f"\n{_how_to_test(adapter, out)}"
    if weights.random_weights:
        typer.echo(UNTRAINED)
    lines = map(wrapped, f"{written} {out}: {note}".splitlines())
    typer.echo("\n".join(lines).replace(HARD, " "))


def _how_to_test(adapter: Path, out: Path) -> str:
    """Return in words which options `evaluate` takes for what the authors' layout leaves out."""
    from vlmadapters.files import read_info, unstored_settings

    info = read_info(adapter)
    words = ["--method", info.config.name]
    if info.task.template != TEMPLATE:
        words += ["--template", info.task.template]
    for name, value in unstored_settings(out, info.config).items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        words += ["--set", f"{name}={text}"]
    more = "; their code has to be told that too" if len(words) > 2 else ""
    return f"`evaluate` takes it with {shlex.join(words).replace(' ', HARD)}{more}"


def _refuse_unmergeable(adapter: Path) -> None:
    """Refuse by the adapter's header, which needs no torch; another file is left to its reader.

    Raises:
        UserError: It is of a method that ships, and that cannot be merged.
    """
    from safetensors import SafetensorError, safe_open

    from vlmadapters.methods.config import UNMERGED

    try:
        with safe_open(adapter, framework="np") as file:
            info = json.loads((file.metadata() or {}).get("description", "{}"))
            name = str(info.get("method"))
    except (OSError, SafetensorError, ValueError, AttributeError):
        return
    # Of a user's method its class alone tells, which imports torch.
    if name in BUILT_IN and not METHODS.config(name).mergeable:
        raise UserError(
            f"{METHODS.config(name).title} {UNMERGED}; leave --form out for the first form that it "
            "allows, or test it with `vlmlayers evaluate --adapter`"
        )
