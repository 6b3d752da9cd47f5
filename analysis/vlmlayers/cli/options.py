"""Options that several verbs share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import wraps
from os.path import exists
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from vlmlayers.errors import UserError
from vlmlayers.positions import TOWERS


def several(help: str, *names: str) -> Any:
    """Return an option that takes several words: with commas in between, or repeated."""
    return typer.Option(*names, metavar="<A,B>", help=f"{help} Several: with commas, or repeated.",
                        callback=_words, show_default=False)  # fmt: skip


def named(help: str) -> Any:
    """Return the argument of a verb that takes several names: one after another, or with commas."""
    return typer.Argument(help=help, callback=_words, show_default=False)


def repeated(help: str, *names: str, metavar: str) -> Any:
    """Return an option that is repeated for several, since one value may have commas inside."""
    return typer.Option(*names, metavar=f"<{metavar}>", help=f"{help} Several: repeated.",
                        show_default=False)  # fmt: skip


def _words(given: list[str] | None) -> list[str] | None:
    """Return the words of an option that may hold several at once; None where it is absent.

    A path that is there stays whole, commas and all.
    """
    if given is None:
        return None
    # Not `Path.exists`, which raises where a list is too long to be the name of a file.
    parts = [[text] if exists(text) else text.split(",") for text in given]  # noqa: PTH110
    words = [word for some in parts for part in some if (word := part.strip())]
    if given and not words:
        raise typer.BadParameter("nothing is named")
    return words


Model = Annotated[
    str,
    typer.Argument(
        help="Architecture, mini-clip, hf-hub:organisation/name, or a folder of open_clip, "
        "transformers or timm with configuration and weights."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", help="Folder that the datasets lie in; else VLMLAYERS_DATA, else ./data."
    ),
]
PresentOnly = Annotated[
    bool, typer.Option("--present-only", help="Leave out items that are not on disk.")
]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Leave unreadable images out instead of stopping, and say so."
    ),
]
Settings = Annotated[
    list[str] | None,
    repeated("An option of the rule or of scoring.", "--set", "-s", metavar="KEY=VALUE"),
]


@dataclass(frozen=True)
class Weights:
    """Which weights a model gets, how images are prepared for them, and at what size."""

    pretrained: Annotated[str | None, typer.Option(help="Tag, or a file of weights.")] = None
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="An untrained model; every output says so.")
    ] = False
    like: Annotated[
        str | None, typer.Option(metavar="TAG", help="Tag that a file was trained like.")
    ] = None
    mean: Annotated[
        str | None, typer.Option(help="Mean of the channels, as in 0.5,0.5,0.5, for a file.")
    ] = None
    std: Annotated[str | None, typer.Option(help="Their standard deviation, likewise.")] = None
    interpolation: Annotated[str | None, typer.Option(help="bicubic or bilinear.")] = None
    resize_mode: Annotated[str | None, typer.Option(help="shortest, longest or squash.")] = None
    image_size: Annotated[
        int | None, typer.Option(help="Side of the images, where it is not the model's own.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `load_model` that were given.

        Raises:
            UserError: Mean or standard deviation are no numbers.
        """
        found = {key: value for key, value in asdict(self).items() if value not in (None, False)}
        for key in {"mean", "std"} & set(found):
            try:
                found[key] = [float(number) for number in found[key].split(",")]
            except ValueError:
                raise UserError(
                    f"--{key} {found[key]!r} is not three numbers such as 0.5,0.5,0.5"
                ) from None
        return found


def poolings(words: Sequence[str]) -> dict[str, str]:
    """Return the pooling of each tower from words such as `mean` or `vision=cls`."""
    pairs = [word.partition("=")[::2] if "=" in word else ("", word) for word in words]
    both = {tower: name for key, name in pairs if not key for tower in TOWERS}
    return both | {tower: name for tower, name in pairs if tower}


def with_weights(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of `Weights` in place of its parameter `weights`."""

    @wraps(verb)
    def run(**given: Any) -> None:
        own = {part.name: given.pop(part.name) for part in fields(Weights)}
        verb(**given, weights=Weights(**own))

    hints = get_type_hints(Weights, include_extras=True)
    signature = inspect.signature(verb, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name != "weights":
            parameters.append(parameter)
            continue
        parameters += [
            parameter.replace(name=part.name, annotation=hints[part.name], default=part.default)
            for part in fields(Weights)
        ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
