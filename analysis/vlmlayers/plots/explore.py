"""An interactive picture of features in Jupyter: depth under a slider, items under the pointer."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from vlmlayers.arguments import Count, Position, Seed, checked
from vlmlayers.errors import UserError
from vlmlayers.features import LayerFeatures
from vlmlayers.plots.features import thumbnails
from vlmlayers.plots.style import CATEGORY_COLOURS, RANDOM_COLOUR, position_title
from vlmlayers.scores.projection import Projection, ShownTower, Space, project

COLOURS = ("dataset", "class", "modality")
SIDE = 48  # pixels of a thumbnail
QUALITY = 70
FRAME = (680, 640)  # pixels of the view with its legend and controls
NAMED = 30  # categories at most in the legend, each in a colour of its own


@checked
def explore(
    features: LayerFeatures | Sequence[LayerFeatures],
    *,
    methods: Sequence[Projection] = ("pca", "tsne"),
    positions: Sequence[Position] | None = None,
    tower: ShownTower = "vision",
    space: Space | None = None,
    data: Any = None,
    thumbnail: bool = True,
    seed: Seed = 0,
    items: Count = 100,
) -> Any:
    """Return an interactive view of features for Jupyter, made with Altair.

    A slider walks along depth; under the pointer stand thumbnail, class and dataset; colour and
    projection are chosen below. `.save("explore.html")` writes it as one file that opens offline.

    Args:
        features: Of one model; one dataset or several.
        methods: Projections to choose from: `pca`, `tsne`, `umap`. Each is computed at every
            position, so that `tsne` takes some seconds per position.
        positions: Those along the slider; all recorded ones where None.
        tower: `vision`, `text`, or `both` in the joint space.
        space: `native`, `normed` or `joint`; `joint` where both towers are shown.
        data: By name of the dataset: its `Manifest` or path, where it is not known by name, or a
            mapping from id to image. One of these itself where there is one dataset.
        thumbnail: Whether images are shown; False where they are not at hand.
        seed: Seed of the draw of items and of `tsne` and `umap`.
        items: At most so many of each dataset and tower.

    Returns:
        An `altair.Chart`, which Jupyter shows without a network.

    Raises:
        UserError: Altair or vl-convert is not installed, an image is missing, or what
            `vlmlayers.scores.projection.project` raises.
    """
    if not (find_spec("altair") and find_spec("vl_convert")):
        raise UserError("explore needs Altair and vl-convert; pip install 'vlm-layers[notebooks]'")
    parts = [features] if isinstance(features, LayerFeatures) else list(features)
    if not (parts and methods):
        raise UserError("explore needs features and at least one projection")
    pictured = thumbnail and tower != "text"
    if data is not None and not pictured:
        raise UserError("data are for thumbnails, and none are shown; leave data out")
    space = space or ("joint" if tower == "both" else "native")
    shown = list(
        positions or parts[0].tower("vision" if tower == "both" else tower).positions(space)
    )
    rows = [
        row
        for method in methods
        for place, name in enumerate(shown)
        for row in _rows(parts, name, place, method, tower, space, seed, items)
    ]
    pictures = _pictures(parts, rows, data) if pictured else []
    untrained = any(part.random_weights for part in parts)
    titles = [position_title(name) for name in shown]
    return _chart(rows, pictures, titles, list(methods), untrained)


def _rows(
    parts: Sequence[LayerFeatures],
    position: str,
    place: int,
    method: Projection,
    tower: ShownTower,
    space: Space,
    seed: int,
    items: int,
) -> list[dict[str, Any]]:
    """Return the points of one position under one projection, scaled to the unit square."""
    table = project(
        parts, position, method=method, tower=tower, space=space, seed=seed, items=items
    )
    for axis in ("x", "y"):
        low, high = table[axis].min(), table[axis].max()
        # Finer than a pixel; the page holds every position times every projection.
        table[axis] = ((table[axis] - low) / ((high - low) or 1)).round(4)
    table["key"] = table["dataset"] + "/" + table["item"]
    kept = table[["x", "y", "dataset", "class", "modality", "key"]]
    named = kept.assign(place=place, method=method).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in named]


def _pictures(
    parts: Sequence[LayerFeatures], rows: Sequence[Mapping[str, Any]], data: Any
) -> list[dict[str, str]]:
    """Return one thumbnail per image as a data URI, looked up by the points."""
    from PIL import Image

    wanted = {(row["dataset"], row["key"]) for row in rows if row["modality"] == "image"}
    found = []
    by_name = isinstance(data, Mapping) and any(part.dataset in data for part in parts)
    for part in parts:
        head = f"{part.dataset}/"
        ids = sorted(key.removeprefix(head) for name, key in wanted if name == part.dataset)
        # A dataset that is not among those given by name is looked up by its own.
        own = data.get(part.dataset) if by_name else data
        for name, array in thumbnails(part, ids, own, SIDE).items():
            content = io.BytesIO()
            Image.fromarray(array).save(content, "JPEG", quality=QUALITY)
            uri = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
            found.append({"key": head + name, "image": uri})
    return found


def _offline_chart() -> type:
    """Return a chart that shows itself without a network: Altair's own page asks for scripts."""
    import altair as alt

    class OfflineChart(alt.Chart):
        def _repr_mimebundle_(self, *_: Any, **__: Any) -> dict[str, str]:
            page = html.escape(self.to_html(inline=True))
            frame = f'width="{FRAME[0]}" height="{FRAME[1]}" style="border:0;max-width:100%"'
            return {"text/html": f'<iframe title="Features" srcdoc="{page}" {frame}></iframe>'}

        def save(self, fp: Any, format: Any = None, *args: Any, **options: Any) -> None:
            options.setdefault("inline", format == "html" or str(fp).endswith(".html"))
            super().save(fp, format, *args, **options)

    return OfflineChart


def _chart(
    rows: list[dict[str, Any]],
    pictures: list[dict[str, str]],
    titles: list[str],
    methods: list[str],
    untrained: bool,
) -> Any:
    """Return the chart: points filtered by slider and choice, pictures joined on."""
    import altair as alt
    import seaborn as sns

    # Values inline: the limit of rows that Altair sets for tables does not hold for these.
    depth = alt.param(
        name="depth",
        value=len(titles) - 1,
        bind=alt.binding_range(min=0, max=len(titles) - 1, step=1, name="Depth "),
    )
    colour = alt.param(
        name="colour",
        value="dataset",
        bind=alt.binding_select(options=list(COLOURS), name="Colour "),
    )
    method = alt.param(
        name="method",
        value=methods[0],
        bind=alt.binding_select(options=methods, name="Method "),
    )
    named = alt.param(name="named", expr=f"{titles!r}[depth]")
    points = (
        _offline_chart()(alt.InlineData(values=rows))
        .transform_filter("datum.place == depth && datum.method == method")
        .transform_calculate(group="datum[colour]")
    )
    if pictures:
        points = points.transform_lookup(
            lookup="key",
            from_=alt.LookupData(alt.InlineData(values=pictures), key="key", fields=["image"]),
        )
    count = NAMED - len(CATEGORY_COLOURS)
    hues = sns.color_palette("husl", count).as_hex()
    more = [hues[7 * i % count] for i in range(count)]  # those in a row are far apart
    said = "random weights" if untrained else alt.Undefined
    title = alt.Title(alt.expr("named"), anchor="start", subtitle=said, subtitleColor=RANDOM_COLOUR)
    hidden = alt.Axis(labels=False, ticks=False, title=None, grid=False)
    tips = [alt.Tooltip("image:N")] if pictures else []
    return (
        points.mark_point(filled=True, size=45, opacity=0.75)
        .encode(
            x=alt.X("x:Q", axis=hidden, scale=alt.Scale(domain=[-0.03, 1.03])),
            y=alt.Y("y:Q", axis=hidden, scale=alt.Scale(domain=[-0.03, 1.03])),
            color=alt.Color(
                "group:N",
                title=None,
                sort=None,  # as they come, which is how `scatter` colours them
                scale=alt.Scale(range=[*CATEGORY_COLOURS, *more]),
                legend=alt.Legend(symbolLimit=NAMED),
            ),
            shape=alt.Shape(
                "modality:N",
                legend=None,
                scale=alt.Scale(domain=["image", "text"], range=["circle", "triangle-up"]),
            ),
            tooltip=[*tips, "class:N", "dataset:N", "modality:N"],
        )
        .add_params(depth, colour, method, named)
        .properties(width=480, height=480, title=title)
        .interactive()
    )
