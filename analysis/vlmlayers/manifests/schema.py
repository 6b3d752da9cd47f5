"""What a manifest may say: the schema of one dataset's TOML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from vlmlayers.data.shards import Members
from vlmlayers.errors import UserError, no_file
from vlmlayers.files import checksum, read_toml
from vlmlayers.manifests.items import SPLITS, checked_path
from vlmlayers.options import Options, Several, validated
from vlmlayers.prompts import TEMPLATE, Template

LARGEST_TOML = 4_000_000  # bytes; a manifest is some hundred lines, never megabytes


def _split_names(table: dict[str, Any]) -> dict[str, Any]:
    for key in table:
        if key not in SPLITS:
            raise ValueError(f"{key!r} is not a split; splits are train, val, test")
    return table


def _inside(path: str) -> str:
    try:
        return checked_path(path, "the manifest")
    except UserError as error:
        raise ValueError(str(error)) from None


def _folder(path: str) -> str:
    if path not in (".", "./"):
        _inside(path.removeprefix("./"))
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
FolderPath = Annotated[str, AfterValidator(_folder)]
Paths = Several[RelativePath]
Hashes = Several[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
Count = Annotated[int, Field(ge=0, le=10**12)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
BySplit = AfterValidator(_split_names)


# Layouts that read a key; those that are not named here are read of every one.
_NAMED = {"folder", "table", "lists", "shards", "huggingface"}
_READ_BY: dict[str, set[str]] = {
    "split_file": {"coop", "captions", "table"},
    "split_sha256": {"coop", "captions", "table"},
    "split_files": {"table", "lists"},
    "split_folders": {"folder", "huggingface"},
    "shards": {"shards"},
    "members": {"shards"},
    "fractions": {"folder", "table"},
    "tail": {"captions"},
    "columns": {"table", "huggingface"},
    "class_names": _NAMED,
    "class_name_file": _NAMED,
    "class_keys": _NAMED,
    "label_order": {"folder"},
}


class Columns(Options):
    """Names of a table's columns."""

    path: str = "path"
    label: str = "label"
    class_name: str = "class_name"
    split: str = "split"
    caption: str = "caption"


class Spec(Options):
    """The content of a manifest. Paths are relative; candidates are tried in order.

    Attributes:
        title: Name of the dataset as people write it.
        kind: What is in the images: objects, scenes, textures, …
        folder: The dataset's folder under the data root; one that starts with `.` lies beside
            the TOML file.
        images: Folder under `folder` to which the items' paths are relative.
        layout: How the dataset lies on the disk.
        split_file: Candidates under the data root for the split, table or captions file.
        split_sha256: Known hashes of that file; empty where none is known.
        split_files: One file per split, under `folder` (layouts `table` and `lists`).
        split_folders: Folder of each split under `images` (layout `folder`); none: those called
            train, val and test, else one for all, split by `fractions`. For `huggingface`: the
            library's name of each split.
        shards: Tar files of each split under `folder`; `*` matches within a name.
        members: Endings of a sample's image, class and captions in shards.
        fractions: Shares of train, val and test where the files do not split.
        tail: Numbers of items at the end of the file that are val and test.
        carve: Share of train that becomes val where the dataset has no val.
        columns: Names of a table's columns.
        classes: Expected number of classes.
        counts: Expected number of items per split.
        class_names: Names by label (or by sorted folder).
        class_name_file: Candidates under the data root for a file of names, one a line.
        class_keys: Whether each line of that file starts with a key (a folder name).
        label_order: `folders`: labels follow the sorted class folders; `rows`: a folder's name
            is the row of its class in the file of names.
        renames: Class names that are replaced.
        drop_classes: Class names that are left out; labels close up.
        only_classes: Class names that are kept; labels close up.
        template: Common prompt template.
        zero_shot_template: Template that the literature uses for zero-shot rows.
        licence: Terms of the images.
        citation: Where the dataset was published.
        get: Where to get it, one entry per part.
        note: What a user should know.
    """

    title: str = Field(min_length=1)
    kind: str = "images"
    folder: FolderPath = "."
    images: RelativePath | None = None
    layout: Literal[
        "coop", "folder", "table", "lists", "captions", "shards", "huggingface", "builtin"
    ]
    split_file: Paths = ()
    split_sha256: Hashes = ()
    split_files: Annotated[dict[str, RelativePath], BySplit] = {}
    split_folders: Annotated[dict[str, RelativePath], BySplit] = {}
    shards: Annotated[dict[str, Paths], BySplit] = {}
    members: Members = Members()
    fractions: Annotated[dict[str, Fraction], BySplit] = {"train": 0.5, "val": 0.2, "test": 0.3}
    tail: Annotated[dict[str, Count], BySplit] = {}
    carve: Annotated[dict[str, Fraction], BySplit] = {}
    columns: Columns = Columns()
    classes: Count | None = None
    counts: Annotated[dict[str, Count], BySplit] = {}
    class_names: tuple[str, ...] = ()
    class_name_file: Paths = ()
    class_keys: bool = True
    label_order: Literal["folders", "rows"] = "folders"
    renames: dict[str, str] = {}
    drop_classes: tuple[str, ...] = ()
    only_classes: tuple[str, ...] = ()
    template: Template = TEMPLATE
    zero_shot_template: Template | None = None
    licence: str = ""
    citation: str = ""
    get: Several[str] = ()
    note: str = ""

    @model_validator(mode="after")
    def _layout_has_its_keys(self) -> Spec:
        needs = {
            "coop": bool(self.split_file),
            "captions": bool(self.split_file),
            "table": bool(self.split_file or self.split_files),
            "lists": bool(self.split_files),
            "shards": bool(self.shards),
        }
        if not needs.get(self.layout, True):
            key = {"lists": "split_files", "shards": "shards"}.get(self.layout, "split_file")
            raise ValueError(f"layout {self.layout!r} needs the key {key!r}")
        for key in _READ_BY:
            if key in self.model_fields_set and self.layout not in _READ_BY[key]:
                raise ValueError(f"layout {self.layout!r} does not read {key!r}; leave it out")
        if self.layout == "folder" and {"fractions", "split_folders"} <= self.model_fields_set:
            raise ValueError(
                "fractions divide a folder without split_folders; leave one of them out"
            )
        if abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"fractions add up to {sum(self.fractions.values()):g}, not to 1")
        if set(self.carve) - {"val"}:
            raise ValueError("carve can only make 'val'")
        return self

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that change with anything the manifest says."""
        return checksum(json.dumps(self.model_dump(mode="json"), sort_keys=True))[:16]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of a manifest's TOML file.

    Raises:
        UserError: The file cannot be read, is too large, is not TOML, or is of a study.
    """
    # Before it is read: the path may be of anything, such as the images' archive.
    if not path.exists():
        # What was meant may be an image folder or a name: no talk of manifests.
        raise UserError(f"{path} {no_file(path)}")
    if path.is_file() and path.stat().st_size > LARGEST_TOML:
        raise UserError(f"{path} is larger than {LARGEST_TOML:,} bytes; not a manifest")
    content = read_toml(path, "the manifest")
    if "models" in content and "layout" not in content:
        raise UserError(f"{path} is a study, not a dataset; run it by `vlmlayers study {path}`")
    return content


def parse_spec(content: dict[str, Any], where: str) -> Spec:
    """Check the content of a manifest.

    Args:
        content: The parsed TOML.
        where: Name of the file, for messages.

    Raises:
        UserError: A key is unknown (with the nearest valid one), missing or has a wrong value.
    """
    return validated(Spec, content, where)
