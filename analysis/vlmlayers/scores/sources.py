"""What features a score table was made from, to be told from those of a later extraction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vlmlayers.files import read_json
from vlmlayers.runs import Run, fingerprint

if TYPE_CHECKING:
    from vlmlayers.features import LayerFeatures

# Of an extraction's identity: what moves features by rounding at most.
_ROUNDING = ("batch_size", "device", "versions")


def source_marks(features: Iterable[LayerFeatures]) -> dict[str, Any]:
    """Return what attributes of a score table tell of the features that it is made from.

    Returns:
        `features`: the marks of the features of each dataset and split; those without identity have
        none. One dataset has several where it is scored by several models or poolings.
        `weights_hash`: that of the weights, where all features tell it and it is one.
    """
    found: dict[str, list[str]] = {}
    hashes = set()
    for one in features:
        hashes.add(str(one.identity.get("weights_hash", "")))
        if one.identity:
            found.setdefault(_name(one.dataset, one.split), []).append(_mark(one.identity))
    known = hashes.pop() if len(hashes) == 1 else ""
    return {"features": found} | ({"weights_hash": known} if known else {})


def other_features(run: Run, attributes: Mapping[Any, Any]) -> str:
    """Return a dataset whose features in a run are not those that its scores were made from.

    Features of an extraction before the last one may have been left out of the scores.

    Args:
        run: The run.
        attributes: Those of its score table.

    Returns:
        Dataset and split; empty where all are, or nothing is known.
    """
    marks = attributes.get("features", {})
    last = run.read_provenance().get("datasets", {}).items()
    known = {*marks, *(_name(one.get("name", name), one.get("split")) for name, one in last)}
    for path in sorted(run.features.glob("*/store.json")) if marks else ():
        store = read_json(path)
        name = _name(store.get("dataset"), store.get("split"))
        if name in known and _mark(store.get("identity", {})) not in marks.get(name, ()):
            return name
    return ""


def _name(dataset: Any, split: Any) -> str:
    return f"{dataset} ({split})"


def _mark(identity: Mapping[str, Any]) -> str:
    return fingerprint({key: one for key, one in identity.items() if key not in _ROUNDING})
