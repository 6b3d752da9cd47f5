"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="Architecture, mini-clip, or a folder with open_clip_config.json and weights."
    ),
]
Pretrained = Annotated[str | None, typer.Option(help="Tag or checkpoint file.")]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="An untrained model; every output says so.")
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
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="An option of the rule or of scoring; repeatable."
    ),
]
