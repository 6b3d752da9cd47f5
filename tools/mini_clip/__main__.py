"""`python -m mini_clip --out DIR`: train, resume, export."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from mini_clip.loop import RECIPE, Training, load_recipe, load_sources, train
from vlmlayers.errors import UserError


def main(
    out: Annotated[Path, typer.Option(help="Checkpoint, log, image cache and export go here.")],
    data_root: Annotated[Path | None, typer.Option(help="Folder of the real images.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    recipe: Annotated[Path, typer.Option(help="Settings of the run.")] = RECIPE,
    start: Annotated[
        Path | None, typer.Option(help="open_clip folder whose weights a new run starts from.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train for so long: sets the number of steps.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves them.")] = 0,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Train the miniature CLIP; start again to continue."""
    for stop in (signal.SIGTERM, signal.SIGINT):  # also where a shell starts us in the background
        signal.signal(stop, signal.default_int_handler)
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Training(load_recipe(recipe, device, steps=steps), out, device)
    if not run.resume() and start:
        run.start_from(start)
    sources = load_sources(run.recipe, out / "cache", data_root, not quiet)
    train(run, sources, minutes=minutes, show=not quiet)
    typer.echo(f"{run.step} steps, {run.seconds / 60:.0f} minutes; exported to {out / 'export'}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stopped; start again to continue", err=True)
        sys.exit(130)
