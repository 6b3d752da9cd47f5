"""Cut small extracts out of the recorded runs: `python tests/vlmadapters/extracts.py SHARED`.

An extract has the format of the file it is cut from and is replayed like it, without SHARED. It
keeps the variants that change no vision block, and in place of the vision tower the features of the
images. Files that have the text tower in common share one file that holds it.

MaPLe, PromptSRC, RPO and LwEIB change both towers in every variant, whose weights take 0.7 MB for
each: they are replayed from SHARED alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import golden
import numpy as np
import torch
from numpy.typing import NDArray

from vlmadapters.clip.savings import Savings
from vlmadapters.methods.base import Method

HERE = Path(__file__).resolve().parents[1] / "golden/methods"
# File to the variants that are kept; the main run where there is none.
KEPT: dict[str, tuple[str, ...]] = {
    "clipadapter": (),
    "cliplora": ("encoder_text",),
    "cocoop": ("words_batch4",),
    "coop": ("random_end", "csc_middle", "words_end"),
    "ivlp": ("text_only_t3c4",),
    "kgcoop": ("published",),
    "lasp": ("ctx_only",),
    "proda": ("batched",),
    "tip": (),
}
IMAGES = ("images", "eval_images", "cache_images", "val_images", "test_images")
# Of Tip-Adapter nothing but features of texts enters, and these are recorded.
TEXTLESS = ("tip",)
SHARED_TOWER = ("cocoop", "coop", "kgcoop", "proda")


def extract(source: Path, variants: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a recorded run says of itself and its arrays, with some variants alone."""
    recording = golden.Recording(source)
    info = dict(recording.info)
    if variants:
        info["variants"] = {name: info["variants"][name] for name in variants}
    info["extract"] = "image features in place of the vision tower; some variants alone"
    backbone, plain = recording.backbone(Savings.none()), Method()
    arrays: dict[str, NDArray[Any]] = {}
    for key in recording.arrays.files:
        if key in IMAGES:
            found = recording.tensor(key)
            leading, flat = found.shape[:-3], found.flatten(0, -4)
            start = plain.first(backbone, "vision")
            with torch.no_grad():
                state = backbone.images(flat, [start])[start]
                features = plain.image_features(backbone, state)
            arrays[f"features/{key}"] = features.unflatten(0, leading).numpy()
        elif _kept(key, recording, variants):
            arrays[key] = recording.arrays[key]
    return info, arrays


def _kept(key: str, recording: golden.Recording, variants: tuple[str, ...]) -> bool:
    """Whether an array stays in an extract."""
    first, *rest = key.split("/")
    if first == "state":
        return not key.startswith("state/visual.")
    if not variants or first in ("labels", "variant_init"):
        return True
    return first in variants or (first == "variant" and rest[0] in variants)


def main(shared: Path) -> None:
    """Write all extracts."""
    HERE.mkdir(parents=True, exist_ok=True)
    for name, variants in KEPT.items():
        info, arrays = extract(shared / f"golden/methods/{name}_tiny.npz", variants)
        state = {key: arrays.pop(key) for key in list(arrays) if key.startswith("state/")}
        if name in SHARED_TOWER:
            info["state"] = "text_tower.npz"
            np.savez_compressed(HERE / info["state"], **state)
        elif name not in TEXTLESS:
            arrays |= state
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
        (HERE / f"{name}.json").write_text(json.dumps(info, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
