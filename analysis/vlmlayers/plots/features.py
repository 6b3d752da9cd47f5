"""Pictures of features: items in a plane, over depth, and nearest items as thumbnails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vlmlayers.arguments import Count, Natural, Position, Seed, checked
from vlmlayers.errors import UserError, shortened
from vlmlayers.features import LayerFeatures
from vlmlayers.manifests import Manifest
from vlmlayers.plots.style import (
    CATEGORY_COLOURS,
    axes,
    colours_of,
    label_text,
    mark_random,
    new_grid,
    position_label,
    position_title,
    short_names,
    style,
)
from vlmlayers.scores.projection import Projection, ShownTower, Space, class_name, nearest, project

MOST_NAMED = 12  # categories beyond are coloured, not named: a legend would hide the points
PANELS = 6


@checked
def scatter(
    features: LayerFeatures | Sequence[LayerFeatures],
    position: Position | Sequence[Position] | None = None,
    *,
    method: Projection = "pca",
    colour: Literal["dataset", "class", "modality"] = "dataset",
    tower: ShownTower | None = None,
    space: Space | None = None,
    palette: Any = None,
    seed: Seed = 0,
    items: Count = 500,
    ax: Axes | None = None,
) -> Axes | np.ndarray:
    """Draw items as points: each image or text where two directions of its features put it.

    Args:
        features: Of one model; one dataset or several.
        position: `embed`, a block, `final` or `proj`. Several make small multiples over depth; None
            takes six that span the tower.
        method: `pca`, `tsne` or `umap` (extra `vlm-layers[umap]`).
        colour: What the colour means; `modality` shows images and texts in one picture.
        tower: `vision`, `text` or `both`; both where the colour is the modality, else vision.
        space: `native`, `normed` or `joint`; `joint` where both towers are shown, else `native`.
        palette: As seaborn takes it: a name, a list, or a mapping from category to colour.
        seed: Seed of the draw of items and of `tsne` and `umap`.
        items: At most so many of each dataset and tower.
        ax: Axes to draw on, for one position; a new figure where None.

    Returns:
        The axes; one row of axes for several positions.

    Raises:
        UserError: As `vlmlayers.scores.projection.project`; `ax` with several positions; or the
            colour is the class where there are none, as of captioned images.
    """
    parts = [features] if isinstance(features, LayerFeatures) else list(features)
    if colour == "class" and not all(part.class_names for part in parts):
        raise UserError("these features have no classes; colour='dataset' or 'modality' is left")
    tower = tower or ("both" if colour == "modality" else "vision")
    options: dict[str, Any] = {
        "method": method, "tower": tower, "seed": seed, "items": items,
        "space": space or ("joint" if tower == "both" else "native"),
    }  # fmt: skip
    one = isinstance(position, str)
    shown = [position] if isinstance(position, str) else position or _spread(parts, options)
    if ax is not None and not one:
        raise UserError("several positions make a figure of their own; name one, or leave out ax")
    tables = {name: project(parts, name, **options) for name in shown}
    random = any(part.random_weights for part in parts)
    with style():
        panels = np.array([axes(ax, (3.35, 2.9))]) if one else new_grid(len(tables), 2.3)
        for number, (name, table) in enumerate(tables.items()):
            last = number == len(tables) - 1
            _points(panels[number], table, colour, palette, legend=last)
            panels[number].set_title(position_title(name))
            mark_random(panels[number], random and number == 0)
        return panels[0] if one else panels


def _spread(parts: Sequence[LayerFeatures], options: Mapping[str, Any]) -> list[str]:
    """Return six recorded positions from the first to the last."""
    if not parts:
        return ["proj"]
    name = "vision" if options["tower"] == "both" else options["tower"]
    names = parts[0].tower(name).positions(options["space"])
    places = np.linspace(0, len(names) - 1, min(PANELS, len(names))).round().astype(int)
    return [names[place] for place in places]


def _points(ax: Axes, table: pd.DataFrame, colour: str, palette: Any, *, legend: bool) -> None:
    import seaborn as sns

    names = list(dict.fromkeys(table[colour]))
    drawn = short_names([label_text(name, among=names) for name in names])
    shown = dict(zip(names, drawn))
    if palette is None:
        palette = (
            list(CATEGORY_COLOURS)[: len(names)]
            if len(names) <= len(CATEGORY_COLOURS)
            else sns.color_palette("husl", len(names))
        )
    else:
        palette = {shown[name]: one for name, one in colours_of(palette, names).items()}
    both = table["modality"].nunique() > 1
    named = legend and len(names) <= MOST_NAMED
    sns.scatterplot(
        data=table.assign(**{colour: table[colour].map(shown)}),
        x="x", y="y", hue=colour, palette=palette, ax=ax, s=9, alpha=0.75, linewidth=0,
        style="modality" if both else None, markers={"image": "o", "text": "^"} if both else True,
        legend="full" if named else False,
    )  # fmt: skip
    ax.set(xlabel="", ylabel="", xticks=[], yticks=[])
    ax.set_box_aspect(1)
    ax.grid(visible=False)
    if named:
        sns.move_legend(ax, "center left", bbox_to_anchor=(1.0, 0.5), title=None, fontsize=6,
                        handletextpad=0.2)  # fmt: skip


@checked
def neighbours(
    features: LayerFeatures,
    item: Natural = 0,
    *,
    positions: Sequence[Position] | None = None,
    count: Count = 5,
    data: Manifest | str | Path | Mapping[str, Any] | None = None,
    space: Space = "native",
    ax: Axes | None = None,
) -> Axes:
    """Draw an image beside its nearest images at several depths, as thumbnails.

    A green frame says that a neighbour is of the same class.

    Args:
        features: Of one dataset, with images.
        item: Row of the image.
        positions: One row of thumbnails each; None takes six that span the tower.
        count: Neighbours.
        data: The dataset or its path, where it is not known by name; or images by id.
        space: `native`, `normed` or `joint`; nearness is the cosine there.
        ax: Axes to draw on; a new figure where None.

    Raises:
        UserError: There is no such item or position, or an image is not on disk.
    """
    shown = list(positions or _spread([features], {"tower": "vision", "space": space}))
    table = nearest(features, item, count=count, positions=shown, space=space)
    images = features.tower("vision")
    wanted = [images.ids[item], *table["item"]]
    pictures = thumbnails(features, wanted, data)
    with style():
        ax = axes(ax, (0.62 * (count + 1) + 0.6, 0.66 * len(shown) + 0.2))
        for line, (_, rows) in enumerate(table.groupby("position", sort=False)):
            _thumbnail(ax, pictures[images.ids[item]], 0, line, "#333333")
            for rank, name, same in zip(rows["rank"], rows["item"], rows["same_class"]):
                _thumbnail(ax, pictures[name], rank + 0.25, line, "#007E5D" if same else "#C9C9C9")
        # After the thumbnails, since every imshow sets the limits anew.
        ax.set(xlim=(-0.55, count + 0.8), ylim=(len(shown) - 0.45, -0.55), aspect="equal")
        ax.set_xticks([0, *(rank + 0.25 for rank in range(1, count + 1))],
                      ["Item", *map(str, range(1, count + 1))])  # fmt: skip
        ax.set_yticks(range(len(shown)), [position_label(name) for name in shown])
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        name = class_name(features, images.labels[item]) or Path(images.ids[item]).name
        ax.set_title(f"Nearest to “{label_text(shortened(name, 30))}”")
        return mark_random(ax, features.random_weights)


def thumbnails(
    features: LayerFeatures, ids: Sequence[str], data: Any = None, size: int = 64
) -> dict[str, np.ndarray]:
    """Return images of a dataset by id as (size, size, 3) bytes.

    Args:
        features: Features that name the dataset and split.
        ids: Ids of images.
        data: The dataset or its path, where it is not known by name; or images by id.
        size: Side in pixels.

    Raises:
        UserError: The dataset is unknown, or an image is not there.
    """
    from PIL import Image, ImageOps

    manifest = None
    if not isinstance(data, Mapping):
        manifest = data if isinstance(data, Manifest) else _pictured(features.dataset, data)
        data = {one.path: one for one in manifest.items(features.split)}
    for name in ids:
        if name not in data:
            where = "data" if manifest is None else manifest.name
            raise UserError(f"{where} has no image {name!r} of the features; give theirs as data")
    found = {
        name: manifest.open_image(data[name], size=size) if manifest else data[name]
        for name in set(ids)
    }
    return {
        name: np.asarray(ImageOps.fit(image if isinstance(image, Image.Image)
                                      else Image.fromarray(np.asarray(image)), (size, size))
                         .convert("RGB"))
        for name, image in found.items()
    }  # fmt: skip


def _pictured(name: str, data: Any) -> Manifest:
    """Return the dataset of a path, or the one that features name."""
    if data is not None:
        return Manifest.load(data)
    try:
        return Manifest.load(name)
    except UserError:
        raise UserError(
            f"no images are known of {name!r}, which the features name; give data: the dataset's "
            "Manifest or path, or images by id (explore draws points alone with thumbnail=False)"
        ) from None


def _thumbnail(ax: Axes, picture: np.ndarray, x: float, y: float, frame: str) -> None:
    from matplotlib.patches import Rectangle

    ax.imshow(picture, extent=(x - 0.44, x + 0.44, y + 0.44, y - 0.44), interpolation="antialiased")
    ax.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=frame,
                           linewidth=1.4))  # fmt: skip
