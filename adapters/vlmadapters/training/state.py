"""The state of an unfinished training on disk, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmadapters.files import content_checksum, read_tensors_only, save_whole
from vlmlayers.errors import UserError
from vlmlayers.features.store import differing_field
from vlmlayers.identity import DataIdentity

STATE_FILE = "training.pt"


def save_training_state(folder: Path, identity: Mapping[str, Any], state: Any) -> None:
    """Write the state of an unfinished training, whole or not at all."""
    content = {"identity": json.dumps(identity, sort_keys=True), **state}
    content["checksum"] = content_checksum(content)
    save_whole(folder / STATE_FILE, content)


def load_training_state(folder: Path, identity: Mapping[str, Any]) -> Any:
    """Return the state of an unfinished training, or None where there is none.

    Raises:
        UserError: The state in the folder is damaged, or belongs to another run.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        content = read_tensors_only(path)
    except UserError as error:
        # The file is ours: nobody has to be asked for another.
        raise UserError(
            f"{path} cannot be read as a state of training; remove it to train this group again"
        ) from error
    expected = content.pop("checksum", None)
    if content_checksum(content) != expected:
        raise UserError(
            f"{path} is altered: its checksum differs; remove it to train this group again"
        )
    # By way of JSON, in which tuples become lists and keys text, as in what was stored.
    theirs, ours = json.loads(content["identity"]), json.loads(json.dumps(identity))
    difference = _difference(theirs, ours)
    if difference is not None:
        raise UserError(
            f"{path} belongs to another run: {difference}; choose another output folder, or "
            "remove the file to start again"
        )
    return content


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    if "data" not in theirs:
        return "an earlier version made it, which kept no sizes and times of the images"
    then, now = (DataIdentity.from_text(one["data"]) for one in (theirs, ours))
    if then != now:
        return f"of other images: {now.changes(then)}"
    return differing_field(theirs, ours)
