"""The verbs `data list`, `data check` and `data shards`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmlayers.cli.extensions import Verb, VerbGroup
from vlmlayers.cli.options import DataRoot, named, several

data_app = typer.Typer(
    cls=VerbGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Datasets: what is known, what is on disk.",
)


@data_app.command("list", cls=Verb)
def data_list(data_root: DataRoot = None) -> None:
    """What is known: every dataset with its classes, items and licence."""
    from vlmlayers.manifests import SPLITS, list_rows
    from vlmlayers.words import text_table

    rows = [
        {
            "name": row["name"],
            "title": row["title"],
            "class": row["classes"],
            **{split: row[split] for split in SPLITS},
            "here": "yes" if row["here"] else "",
            "licence": row["licence"],
        }
        for row in list_rows(data_root)
    ]
    typer.echo(text_table(rows, widths={"title": 12, "licence": 8}))


@data_app.command("check", cls=Verb)
def data_check(
    names: Annotated[list[str] | None, named("Datasets; all where absent.")] = None,
    data_root: DataRoot = None,
    full: Annotated[
        bool, typer.Option("--full", help="Decode every image, and tell the content of all.")
    ] = False,
) -> None:
    """What is on disk, missing, altered or unusable; where to get it."""
    from vlmlayers.manifests import check_table, exit_code

    table = check_table(names or (), data_root, full)
    for line in table["line"]:
        typer.echo(line)
    raise typer.Exit(exit_code(table, names or ()))


@data_app.command("shards", cls=Verb)
def data_shards(
    name: Annotated[str, typer.Argument(help="Dataset: a name, image folder, table or TOML file.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards and their manifest.toml.")],
    splits: Annotated[
        list[str] | None,
        several("A split; all where absent.", "--split"),
    ] = None,
    per_shard: Annotated[int, typer.Option(help="Items in one tar file.")] = 1000,
    data_root: DataRoot = None,
) -> None:
    """Convert a dataset to webdataset shards with a manifest."""
    from vlmlayers.manifests import Manifest, write_shards

    manifest = Manifest.load(name)
    chosen = splits or manifest.splits(data_root)
    written = write_shards(manifest, chosen, out, per_shard, data_root)
    typer.echo(f"{Manifest.load(str(written)).check().line()}\n{written}")
