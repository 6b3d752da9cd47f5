"""Features brought down to two directions, and nearest items: what pictures of features show."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmlayers.arguments import Count, Natural, Position, Seed, checked
from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.positions import TOWERS, is_block
from vlmlayers.scores.parts import balanced_rows, refuse_not_finite
from vlmlayers.scores.reading import partner_block
from vlmlayers.scores.scoring import expect_one_model
from vlmlayers.words import counted

Projection = Literal["pca", "tsne", "umap"]
ShownTower = Literal["vision", "text", "both"]
Space = Literal["native", "normed", "joint"]
SAME = 1e-5  # share of the largest value below which float32 features do not differ
LEAST = 5  # items that two directions say anything about
MODALITIES = {"vision": "image", "text": "text"}


@checked
def project(
    features: LayerFeatures | Sequence[LayerFeatures],
    position: Position,
    *,
    method: Projection = "pca",
    tower: ShownTower = "vision",
    space: Space = "native",
    seed: Seed = 0,
    items: Count = 2000,
) -> pd.DataFrame:
    """Return items as points of a plane, computed over all datasets together.

    Args:
        features: Of one model; one dataset or several.
        position: `embed`, a block, `final` or `proj`. With `tower="both"` the texts are read at the
            block of equal relative depth.
        method: `pca` is linear and keeps distances as far as two directions can; `tsne` and `umap`
            keep neighbours, and distances between their groups mean nothing.
        tower: `both` needs `space="joint"`, where both have the same width.
        space: `native`, `normed` or `joint`.
        seed: Seed of the draw of items and of `tsne` and `umap`.
        items: At most so many of each dataset and tower, balanced over classes.

    Returns:
        One row per item: `x`, `y`, `dataset`, `class`, `modality` (`image` or `text`), `item` (the
        image's path or the text), `row` (its row in the features), `position`.

    Raises:
        UserError: Several models, a dataset twice, a position or space that was not recorded, NaN
            or Inf, towers of different width, fewer than five items, or `umap` without the package
            umap-learn.
    """
    parts = [features] if isinstance(features, LayerFeatures) else list(features)
    _one_model(parts)
    if tower == "both" and space != "joint":
        raise UserError("images and texts have the same width in the joint space only: "
                        "space='joint'")  # fmt: skip
    names = TOWERS if tower == "both" else (tower,)
    found = [
        _points(part, part.tower(name), _place(part, name, position, tower), space, seed, items)
        for part in parts
        for name in names
    ]
    values = np.concatenate([array for array, _ in found])  # (item, width)
    if len(values) < LEAST:
        raise UserError(
            f"{counted(len(values), 'item')}; at least {LEAST} are needed for a picture of them"
        )
    table = pd.concat([frame for _, frame in found], ignore_index=True)
    x, y = _plane(values, method, seed).T
    return table.assign(x=x, y=y, position=position)


@checked
def nearest(
    features: LayerFeatures,
    item: Natural,
    *,
    count: Count = 5,
    positions: Sequence[Position] | None = None,
    tower: Literal["vision", "text"] = "vision",
    space: Space = "native",
) -> pd.DataFrame:
    """Return the nearest other items of one item by cosine, at each position.

    Args:
        features: Of one dataset.
        item: Row of the item.
        count: Neighbours.
        positions: All recorded ones where None.
        tower: Tower.
        space: Space.

    Returns:
        `position`, `rank` from 1, `row`, `item`, `class`, `cosine`, `same_class`.

    Raises:
        UserError: There is no such row, position or space, or features are NaN or Inf.
    """
    part = features.tower(tower)
    part.require_vectors()
    if item >= len(part):
        raise UserError(f"there is no item {item}; valid: 0 to {len(part) - 1}")
    rows = []
    for position in positions or part.positions(space):
        array = np.asarray(part.array(position, space), dtype=np.float64)
        refuse_not_finite(array, features, part, position, space)
        unit = array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
        cosine = unit @ unit[item]
        order = [r for r in np.argsort(-cosine, kind="stable") if r != item][:count]
        rows += [
            {
                "position": position, "rank": rank, "row": int(row), "item": part.ids[row],
                "class": class_name(features, part.labels[row]), "cosine": float(cosine[row]),
                "same_class": bool(
                    features.class_names and part.labels[row] == part.labels[item]
                ),
            }
            for rank, row in enumerate(order, 1)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def class_name(features: LayerFeatures, label: int) -> str:
    """Return the name of a class; empty where there are none, as of captioned images."""
    return features.class_names[label] if features.class_names else ""


def _one_model(parts: Sequence[LayerFeatures]) -> None:
    models = sorted({f"{part.model} ({part.weights})" for part in parts})
    if len(models) != 1:
        named = ", ".join(models) or "none"
        raise UserError(f"one picture shows features of one model, not {len(models)}: {named}")
    expect_one_model(parts)
    names = [part.dataset for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"dataset {name!r} is given {names.count(name)} times, and its items would be "
                "drawn as one; give it once, or `dataclasses.replace` its name"
            )


def _place(features: LayerFeatures, name: str, position: str, shown: str) -> str:
    """Return the position at which a tower is read: of texts beside images the partner's."""
    if shown != "both" or name == "vision" or not is_block(position):
        return position
    own, other = (features.tower(tower).blocks for tower in TOWERS)
    return str(partner_block(int(position), own, other))


def _points(
    features: LayerFeatures, tower: TowerFeatures, position: str, space: str, seed: int, items: int
) -> tuple[NDArray[np.float32], pd.DataFrame]:
    """Return features and what the items are, of a balanced draw of one tower."""
    tower.require_vectors()
    rows = balanced_rows(tower.labels, items, np.random.default_rng(seed))
    frame = pd.DataFrame({
        "dataset": features.dataset,
        "class": [class_name(features, label) for label in tower.labels[rows]],
        "modality": MODALITIES[tower.tower],
        "item": [tower.ids[row] for row in rows],
        "row": rows,
    })  # fmt: skip
    array = tower.array(position, space)
    refuse_not_finite(array, features, tower, position, space)
    return np.asarray(array[rows], dtype=np.float32), frame


def _plane(values: NDArray[np.float32], method: str, seed: int) -> NDArray[np.float64]:
    """Return the items' places in two directions, (item, 2)."""
    centred = values - values.mean(axis=0)
    if np.abs(centred).max() <= SAME * np.abs(values).max():
        return np.zeros((len(values), 2))  # such as `embed` under `cls`: the same for every item
    if method == "pca":
        # In float64, where nearly equal singular values keep their order on every machine.
        left, size, _ = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
        flip = np.sign(left[np.abs(left[:, :2]).argmax(axis=0), [0, 1]])  # a sign that repeats
        plane: NDArray[np.float64] = left[:, :2] * size[:2] * flip
        return plane
    made: Any
    if method == "tsne":
        from sklearn.manifold import TSNE

        # scikit-learn refuses a perplexity that is not below the number of items.
        made = TSNE(perplexity=min(30, (len(values) - 1) / 3), init="pca", random_state=seed)
    else:
        if find_spec("umap") is None:
            raise UserError(
                "method 'umap' needs umap-learn; pip install 'vlm-layers[umap]', or take 'tsne'"
            )
        from umap import UMAP

        # A seed makes UMAP use one thread anyway; unless told, it warns of that.
        made = UMAP(n_neighbors=min(15, len(values) - 1), random_state=seed, n_jobs=1)
    found: NDArray[np.float64] = np.asarray(made.fit_transform(centred), dtype=np.float64)
    return found
