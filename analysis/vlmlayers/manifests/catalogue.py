"""Which manifests there are: shipped ones, the user's own, built-in datasets, folders, tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlmlayers.data import builtin
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import shipped
from vlmlayers.manifests.layouts.builtin import code_hash
from vlmlayers.manifests.layouts.folder import split_folders
from vlmlayers.manifests.layouts.huggingface import METADATA, holds_tables
from vlmlayers.manifests.layouts.table import READERS
from vlmlayers.manifests.schema import Columns, Spec, parse_spec, read_manifest

MANIFESTS_VARIABLE = "VLMLAYERS_MANIFESTS"
_UNTELLING = ("items", "metadata")  # names of tables that say less than their folder's
# Of the files in METADATA; as if by default, since not all of them have captions.
_HUB_COLUMNS = Columns.model_construct(set(), path="file_name", caption="text")


def folders() -> list[Path]:
    """Return the folders of manifests: those of `VLMLAYERS_MANIFESTS`, then the shipped one."""
    own = os.environ.get(MANIFESTS_VARIABLE, "").split(os.pathsep)
    return [*(Path(folder) for folder in own if folder), shipped("data_manifests")]


def _files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.toml")):
            # The user's folders come first: an own manifest goes before a shipped one.
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Return all names that can be loaded."""
    files = _files()
    return [*files, *(name for name in builtin.names() if name not in files)]


def is_path(name: str) -> bool:
    """Return whether a name is written as a path, so that it can be nothing else."""
    file = Path(name).suffix.lower() in (".toml", *READERS)
    return file or os.sep in name or "/" in name or name in (".", "..")


def find(name: str | os.PathLike[str]) -> tuple[str, Spec, Path | None]:
    """Return name, content and source of a manifest.

    Raises:
        UserError: There is none of that name, or it is not valid.
    """
    text = os.fspath(name)
    if text in (files := _files()):
        return text, parse_spec(read_manifest(files[text]), str(files[text])), files[text]
    if text in builtin.names():
        return text, _builtin_spec(text), None
    if not text.strip():
        raise UserError(
            "a dataset has no name; name one, a folder of images, a table or a TOML file"
        )
    path = Path(text).expanduser()
    if path.suffix.lower() in READERS and path.is_file():
        columns = _HUB_COLUMNS if path.name in METADATA else Columns()
        # The guide calls every table items.csv: two of them are told apart by their folders.
        name = path.resolve().parent.name if path.stem in _UNTELLING else path.stem
        name = name or path.stem  # of the disk's own folder
        spec = Spec(title=name, layout="table", split_file=(path.name,), columns=columns)
        return name, spec, path
    if not (is_path(text) or path.is_dir()):
        try:
            check_one_of("dataset", text, names())
        except UserError as error:
            raise UserError(f"{error} (and no folder of that name is here)") from None
    if path.is_dir() and not (path / "manifest.toml").is_file():
        return path.resolve().name, _folder_spec(path), path
    path = path / "manifest.toml" if path.is_dir() else path
    if path.is_file() and path.suffix.lower() != ".toml":
        raise UserError(
            f"{path} is neither a folder of images, nor a table ({', '.join(READERS)}), nor a "
            "manifest (.toml), which also names what lies in shards, lists and split files"
        )
    stem = path.resolve().parent.name if path.stem == "manifest" else path.stem
    spec = parse_spec(read_manifest(path), str(path))
    if spec.layout == "builtin":
        raise UserError(f"{path}: layout 'builtin' is for datasets that are drawn by code")
    return stem, spec, path


def _builtin_spec(name: str) -> Spec:
    data = builtin.get(name)
    scans = name == "digits"
    return Spec(
        title=data.title,
        kind=data.domain,
        layout="builtin",
        classes=len(data.class_names),
        counts=dict(data.sizes),
        licence="CC BY 4.0 (UCI), through scikit-learn" if scans else "MIT, drawn by this package",
        citation="Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI, 1998"
        if scans
        else "",
        get=("nothing to get: it comes with the Python packages",),
        note=f"drawn by code {code_hash()}",
    )


def _folder_spec(path: Path) -> Spec:
    """Describe a folder of images that has no manifest by what is in it."""
    content: dict[str, Any] = {"title": path.resolve().name or "images", "folder": "."}
    if holds_tables(path):
        return Spec(**content, layout="huggingface")
    splits = split_folders(path)
    tables = {
        split: f"{folder}/{file}"
        for split, folder in splits.items()
        # The last entry of a key stays, so that the first of METADATA wins.
        for file in reversed(METADATA)
        if (path / folder / file).is_file()
    }
    if tables:
        return Spec(**content, layout="table", split_files=tables, columns=_HUB_COLUMNS)
    for file in METADATA:
        if (path / file).is_file():
            return Spec(**content, layout="table", split_file=(file,), columns=_HUB_COLUMNS)
    return Spec(**content, layout="folder", split_folders=splits)
