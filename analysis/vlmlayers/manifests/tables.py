"""Tables of what is known and what is on disk, for the command line and for Jupyter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmlayers.arguments import checked
from vlmlayers.manifests.items import SPLITS
from vlmlayers.manifests.manifest import Manifest
from vlmlayers.manifests.place import Root

if TYPE_CHECKING:
    import pandas as pd


@checked
def list_table(root: Root = None) -> pd.DataFrame:
    """Return what is known: one row per dataset, whether or not it is on this machine.

    Columns: name, title, kind, layout, classes, train, val, test, here, licence. `here` says
    whether the dataset's folder exists; `check_table` looks into it.
    """
    import pandas as pd

    return pd.DataFrame(list_rows(root)).astype(dict.fromkeys(("classes", *SPLITS), "Int64"))


@checked
def list_rows(root: Root = None) -> list[dict[str, Any]]:
    """Return the rows of `list_table`, without importing pandas."""
    rows = []
    for name in Manifest.names():
        manifest = Manifest.load(name)
        spec = manifest.spec
        built_in = spec.layout == "builtin"
        rows.append(
            {
                "name": name,
                "title": spec.title,
                "kind": spec.kind,
                "layout": spec.layout,
                "classes": spec.classes,
                **{split: spec.counts.get(split) for split in SPLITS},
                "here": built_in or manifest.place(root).folder.is_dir(),
                "licence": spec.licence,
            }
        )
    return rows


@checked
def check_table(names: Sequence[str] = (), root: Root = None, full: bool = False) -> pd.DataFrame:
    """Return what is on disk: one row per dataset of `names`, or of all that are known.

    Columns: name, state, expected, found, missing, first_missing, unreadable, notes, get, and
    `line`, the whole result in one line.

    Raises:
        UserError: A name is unknown.
    """
    rows = []
    for manifest in [Manifest.load(name) for name in names or Manifest.names()]:
        result = manifest.check(root, full)
        rows.append(
            {
                "name": result.name,
                "state": result.state,
                "expected": sum(result.expected.values()) or None,
                "found": result.found,
                "missing": result.missing,
                "first_missing": ", ".join(result.first_missing),
                "unreadable": len(result.unreadable),
                "notes": "; ".join(result.notes),
                "get": "; ".join(result.get),
                "line": result.line(),
            }
        )
    import pandas as pd  # an unknown name has been said before this takes its second

    return pd.DataFrame(rows).astype({"expected": "Int64"})


def exit_code(table: pd.DataFrame, names: Sequence[str] = ()) -> int:
    """Return 2 if a dataset that was asked for by name is not complete, else 0."""
    complete = table["state"].isin(["complete", "built-in"])
    return 2 if names and not bool(complete.all()) else 0
