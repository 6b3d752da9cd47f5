"""How a manifest shows itself in Jupyter."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from vlmlayers.manifests.items import SPLITS
from vlmlayers.manifests.schema import Spec


def manifest_html(name: str, spec: Spec, classes: int | None, counts: Mapping[str, int]) -> str:
    """Return a small HTML table that describes a manifest; everything in it is escaped."""
    rows = {
        "name": name,
        "kind": spec.kind,
        "layout": spec.layout,
        "classes": "" if classes is None else str(classes),
        "items": ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if split in counts),
        "template": spec.template,
        "zero-shot template": spec.zero_shot_template or "",
        "licence": spec.licence,
        "citation": spec.citation,
        "get it": "; ".join(spec.get),
        "note": spec.note,
    }
    body = "".join(
        f"<tr><th style='text-align:left'>{escape(key)}</th>"
        f"<td style='text-align:left'>{escape(value)}</td></tr>"
        for key, value in rows.items()
        if value
    )
    title = f"<caption style='white-space:nowrap'><b>{escape(spec.title)}</b></caption>"
    return f"<table>{title}{body}</table>"
