"""The architectures as text: what their configurations say, or what a check finds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmlayers.architectures import CONFIG_FILE, MINIATURES, configuration_files
from vlmlayers.errors import UserError, check_one_of
from vlmlayers.files import read_json
from vlmlayers.words import text_table


def models_text(names: Sequence[str] | None = None, *, check: bool = False) -> str:
    """Return the architectures as a table.

    Args:
        names: Architectures; all that open_clip knows where None.
        check: Build each without weights and find its towers, instead of reading configurations.

    Raises:
        UserError: A name is unknown, or a file or folder.
    """
    rows = configurations(names)
    if not check:
        return text_table(rows, {"model": 29, "vision": 17, "text": 16})
    from vlmlayers.models.check import models_check, summary

    table = models_check(names, progress=True)
    shown = [
        {"model": row["model"], "vision": _tower(row, "vision"), "text": _tower(row, "text")}
        for row in table.to_dict("records")
    ]
    lines = [text_table(shown, {"model": 29, "vision": 27, "text": 19}), ""]
    lines += [f"{name}: {why}" for name, why in zip(table["model"], table["reason"]) if why]
    if "stages" in set(table["vision_kind"]):
        lines.append("Stages count as blocks; joint space is defined at the last of them only.")
    return "\n".join([*lines, summary(table)])


def _tower(row: Mapping[Hashable, Any], tower: str) -> str:
    """Return blocks, width and pooling of a tower as a table shows them."""
    if row["status"] == "refused":
        return "refused" if tower == "vision" else ""
    stages = " stages" if row.get(f"{tower}_kind") == "stages" else ""
    pooling = row[f"{tower}_pooling"].removeprefix("model (").rstrip(")")
    words = pooling.partition(",")[0].removesuffix(" pool")
    return f"{row[f'{tower}_blocks']}{stages} × {row[f'{tower}_width']} {words}"


def configurations(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return what open_clip's configurations say: model, image, vision, text, joint.

    Reads the files, so that listing needs no torch. Foreign trunks and text towers are named;
    how many blocks they have is for `check` to find.
    """
    files = configuration_files()
    shipped = {name: folder / CONFIG_FILE for name, folder in MINIATURES.items()}
    files |= {name: file for name, file in shipped.items() if file.is_file()}
    for name in names or ():
        if name not in files and Path(name).exists():
            raise UserError(f"{name} is a model of your own, and these are those of open_clip; "
                            f"vl.load_model({name!r}).towers says its blocks")  # fmt: skip
        check_one_of("model", name, files)
    return [_row(name, path) for name, path in files.items() if not names or name in names]


def _row(name: str, path: Path) -> dict[str, Any]:
    content = read_json(path)
    config = content.get("model_cfg", content)
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    return {
        "model": name,
        "image": vision.get("image_size", 224),
        "vision": _words(vision, "timm_model_name"),
        "text": _words(text, "hf_model_name"),
        "joint": config.get("embed_dim"),
    }


def _words(part: dict[str, Any], foreign: str) -> str:
    if part.get(foreign):
        return str(part[foreign]).rpartition("/")[2]
    layers = part.get("layers", 12)
    blocks = "+".join(map(str, layers)) if isinstance(layers, list) else str(layers)
    return f"{blocks} × {part.get('width', '?')}"
