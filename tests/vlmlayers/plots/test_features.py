"""Pictures of features: what they show, in seaborn's conventions, with planted answers."""

from __future__ import annotations

import html
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist

import vlmlayers as vl
from vlmlayers.errors import UserError
from vlmlayers.plots.style import label_text
from vlmlayers.scores.projection import nearest, project

NAMES = ("cat", "dog", "emu")


def planted(dataset: str = "pets", shift: float = 0.0, n: int = 30) -> vl.LayerFeatures:
    """Classes apart by ten along one axis at block 2, all alike at `embed`; texts lie elsewhere."""
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 3

    def apart(rows: np.ndarray, far: float) -> np.ndarray:
        values = generator.normal(size=(len(rows), 6)) * 0.1
        values[:, 0] += 10 * rows
        values[:, 1] += far
        return values

    by_depth = {"embed": np.ones((n, 6)), "1": apart(labels, shift), "2": apart(labels, shift)}
    words = {"1": apart(np.arange(3), 50), "2": apart(np.arange(3), 50)}
    return vl.LayerFeatures.from_arrays(
        by_depth, words, labels=labels, class_names=NAMES, space="joint", dataset=dataset
    )


def broken() -> vl.LayerFeatures:
    """The same with one number lost at block 2."""
    features = planted()
    features.tower("vision").array("2", "joint")[3, 0] = np.nan
    return features


def test_projection_keeps_planted_distances() -> None:
    table = project(planted(), 2, space="joint")
    means = table.groupby("class")["x"].mean().sort_values()
    assert np.diff(means) == pytest.approx([10, 10], abs=0.2)
    centred = planted().tower("vision").array("2", "joint")[table["row"]]
    centred = centred - centred.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov(centred.T))
    assert abs(np.corrcoef(centred @ directions[:, -1], table["x"])[0, 1]) == pytest.approx(1)
    for axis in ("x", "y"):  # of two signs that fit as well the one with the farthest item above 0
        assert table[axis].iloc[table[axis].abs().argmax()] > 0
    same = project(planted(), "embed", space="joint")
    assert not same[["x", "y"]].to_numpy().any(), "rounding noise is no picture"
    for method in ("pca", "tsne"):
        one, two = (project(planted(), 2, space="joint", method=method, seed=3) for _ in range(2))
        assert one.equals(two)


def test_texts_alone_are_read_at_their_own_blocks() -> None:
    """Beside images they are read at the block of equal relative depth."""
    generator = np.random.default_rng(0)
    images = {block: generator.normal(size=(8, 2)) for block in "1234"}
    words = {block: generator.normal(size=(8, 2)) for block in "12"}
    features = vl.LayerFeatures.from_arrays(
        images, words, labels=range(8), class_names=list("abcdefgh"), space="joint"
    )
    alone = replace(features, vision=None)
    for block in words:
        one, other = (project(f, block, tower="text", space="joint") for f in (features, alone))
        assert one.equals(other)
    pairs = {"1": "1", "2": "1", "3": "2", "4": "2"}
    for block, partner in pairs.items():
        table = project(features, block, tower="both", space="joint")
        apart = pdist(np.vstack([images[block], words[partner]]))
        assert pdist(table[["x", "y"]]) == pytest.approx(apart, abs=1e-5)


def test_neighbours_are_those_of_the_cosine() -> None:
    features = planted()
    table = nearest(features, 4, count=3, positions=["2"], space="joint")
    unit = features.tower("vision").array("2", "joint").astype(float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    order = [row for row in np.argsort(-(unit @ unit[4])) if row != 4]
    assert list(table["row"]) == order[:3] and list(table["rank"]) == [1, 2, 3]
    assert table["same_class"].tolist() == [row % 3 == 1 for row in order[:3]]
    with pytest.raises(UserError, match="no item 30; valid: 0 to 29"):
        nearest(features, 30)


def test_captioned_images_without_classes_have_neighbours_and_a_place() -> None:
    features = planted()
    images = replace(features.tower("vision"), labels=np.full(30, -1))
    features = replace(features, vision=images, text=None, class_names=())
    plain = nearest(planted(), 4, positions=["2"], space="joint")
    table = nearest(features, 4, positions=["2"], space="joint")
    assert list(table["row"]) == list(plain["row"])
    assert set(table["class"]) == {""} and not table["same_class"].any()
    places = project(features, 2, space="joint")[["x", "y"]]
    assert np.linalg.norm(places, axis=1) == pytest.approx(
        np.linalg.norm(project(planted(), 2, space="joint")[["x", "y"]], axis=1)
    )
    thumbs = dict.fromkeys(images.ids, np.zeros((8, 8, 3), np.uint8))
    ax = vl.plots.neighbours(features, 4, positions=[2], data=thumbs, space="joint")
    assert images.ids[4] in ax.get_title(loc="left")
    assert isinstance(vl.plots.scatter(features, 2, space="joint"), Axes)


def test_a_scatter_follows_the_conventions_of_seaborn() -> None:
    ax = Figure().subplots()
    drawn = vl.plots.scatter(
        planted(), 2, space="joint", colour="class", ax=ax, palette=dict(zip(NAMES, "rgb"))
    )
    assert drawn is ax and ax.get_title(loc="left") == "Block 2"
    legend = ax.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == list(NAMES)
    points = ax.collections[0]
    assert len(points.get_offsets()) == 30
    assert {to_hex(c) for c in points.get_facecolors()} == {to_hex(c) for c in "rgb"}
    several = vl.plots.scatter([planted(), planted("more", 30)], space="joint", colour="dataset")
    assert [ax.get_title(loc="left") for ax in several] == ["Embed", "Block 1", "Block 2"]
    assert all(isinstance(ax, Axes) for ax in several)


def test_images_and_texts_stand_in_one_picture_in_the_joint_space() -> None:
    ax = vl.plots.scatter(planted(), 2, colour="modality")
    assert isinstance(ax, Axes)
    table = project(planted(), 2, tower="both", space="joint")
    assert table["modality"].value_counts().to_dict() == {"image": 30, "text": 3}
    apart = table.groupby("modality")[["x", "y"]].mean()
    assert np.linalg.norm(apart.loc["image"] - apart.loc["text"]) == pytest.approx(50, abs=1)
    with pytest.raises(UserError, match="joint"):
        vl.plots.scatter(planted(), 2, tower="both", space="native")


def test_thumbnails_of_neighbours_come_from_the_dataset_or_from_the_caller() -> None:
    features = planted()
    ids = features.tower("vision").ids
    images = {name: np.full((8, 8, 3), 8 * row, np.uint8) for row, name in enumerate(ids)}
    ax = vl.plots.neighbours(features, 4, positions=[1, 2], count=3, data=images, space="joint")
    assert len(ax.images) == 2 * 4
    shades = [int(np.asarray(image.get_array())[0, 0, 0]) // 8 for image in ax.images]
    wanted = nearest(features, 4, count=3, positions=["1", "2"], space="joint")
    assert shades == [4, *wanted["row"][:3], 4, *wanted["row"][3:]]
    frames = [to_hex(patch.get_edgecolor()) for patch in ax.patches]
    assert frames.count("#007e5d") == int(wanted["same_class"].sum())


def test_umap_is_refused_in_one_line_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmlayers.scores.projection.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vlm-layers\[umap\]', or take 'tsne'"):
        vl.plots.scatter(planted(), 2, method="umap", space="joint")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: vl.plots.scatter(f, 9, space="joint"), "unknown position '9'"),
        # Who counts from 0 is not sent to block 10.
        (lambda f: vl.plots.scatter(f, 0, space="joint"), "position '0' .*; valid: embed, 1"),
        (lambda f: vl.plots.scatter(f, 1), "unknown space 'native'"),
        (lambda f: vl.plots.scatter(f, 1, method="pcca"), "method"),
        (lambda f: vl.plots.scatter([], 1), "one model, not 0"),
        (lambda f: vl.plots.scatter([f, f], 1, space="joint"), "dataset 'pets' is given 2 times"),
        (lambda f: vl.plots.scatter(broken(), 2, space="joint"), "has NaN or Inf in item 3"),
        (lambda f: nearest(broken(), 0, space="joint"), r"vision at 2 \(joint\) has NaN or Inf"),
        (lambda f: vl.plots.scatter(f, [1, 2], space="joint", ax=Figure().subplots()), "ax"),
        (lambda f: vl.plots.scatter(planted(n=4), 1, space="joint"), "4 items; at least 5"),
        (
            lambda f: vl.plots.scatter(f, 1, space="joint", palette={"x": "r"}),
            "no colour for",
        ),
        (lambda f: vl.plots.neighbours(f, space="joint", data={}), "data has no image '"),
        (lambda f: vl.plots.neighbours(f, space="joint", data="nowhere/pets"), "does not exist"),
        (lambda f: vl.explore(f, space="joint", data=3), "name takes a string"),
        (
            lambda f: vl.plots.neighbours(planted("mine"), space="joint"),
            "no images are known of 'mine'.*give data",
        ),
        (
            lambda f: vl.explore(f, space="joint", data={}, thumbnail=False),
            "data are for thumbnails, and none are shown",
        ),
    ],
)
def test_bad_input(call: Callable[[vl.LayerFeatures], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(planted())


@pytest.mark.parametrize("name", ["猫と犬", "кошка", "قطة", "बिल्ली", "🐈 cat", "$x$", "_hidden"])
def test_names_in_any_script_are_drawn_or_replaced_without_a_warning(name: str) -> None:
    features = planted(dataset=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = vl.plots.scatter([features, planted("other")], 2, space="joint")
        ax.figure.canvas.draw()  # type: ignore[union-attr]
    assert label_text("plain", ["plain", name]) == "plain"
    one, two = (label_text(text, ["\U0001f9ff", "\U0001f9fe"]) for text in "\U0001f9ff\U0001f9fe")
    assert one != two, "names that cannot be drawn are still told apart"


def test_names_that_only_an_underscore_or_their_length_tells_apart_stay_apart() -> None:
    long = "a_class_of_a_name_of_more_than_sixty_characters_without_a_space"
    features = replace(planted(), class_names=("a", "_a", long))
    ax = vl.plots.scatter(features, "2", space="joint", colour="class")
    assert isinstance(ax, Axes)
    legend = ax.get_legend()
    assert legend is not None
    assert sorted(one.get_text() for one in legend.texts) == ["a", "a (2)", "a_class_of_a_name…"]
    pictures = {name: np.zeros((8, 8, 3), np.uint8) for name in features.tower("vision").ids}
    ax = vl.plots.neighbours(features, 2, data=pictures, space="joint")
    assert "a_class_of_a" in ax.get_title("left")


def test_explore_holds_every_position_item_and_thumbnail() -> None:
    pytest.importorskip("altair", reason="needs the extra 'notebooks'")
    features = planted()
    ids = features.tower("vision").ids
    images = {name: np.full((8, 8, 3), 8 * row, np.uint8) for row, name in enumerate(ids)}
    chart = vl.explore(features, methods=["pca"], space="joint", data=images)
    content = json.loads(chart.to_json())
    rows = inline(content, content["data"])
    assert len(rows) == 3 * 30 and {row["place"] for row in rows} == {0, 1, 2}
    assert all(0 <= row[axis] <= 1 for row in rows for axis in "xy")
    assert {param["name"] for param in content["params"]} >= {"depth", "colour", "method"}
    slider = next(param for param in content["params"] if param["name"] == "depth")
    assert slider["bind"]["input"] == "range" and slider["bind"]["max"] == 2
    lookup = next(step for step in content["transform"] if "lookup" in step)
    pictures = inline(content, lookup["from"]["data"])
    assert {one["key"] for one in pictures} == {row["key"] for row in rows}
    assert all(one["image"].startswith("data:image/jpeg;base64,") for one in pictures)
    chart = vl.explore(features, methods=["pca"], tower="both", thumbnail=False, positions=[1, 2])
    both = json.loads(chart.to_json())
    assert {row["modality"] for row in inline(both, both["data"])} == {"image", "text"}


def test_explore_looks_up_a_dataset_that_is_not_given_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra 'notebooks'")
    asked: dict[str, object] = {}

    def told(part: vl.LayerFeatures, ids: object, data: object, size: int) -> dict:
        asked[part.dataset] = data
        return {}

    monkeypatch.setattr("vlmlayers.plots.explore.thumbnails", told)
    both = [planted(), planted("birds")]
    vl.explore(both, methods=["pca"], space="joint", data={"pets": "here"})
    assert asked == {"pets": "here", "birds": None}


def test_explore_says_that_weights_are_random_and_tells_thirty_classes_apart() -> None:
    pytest.importorskip("vl_convert", reason="needs the extra 'notebooks'")
    for random in (False, True):
        features = replace(planted(), random_weights=random)
        chart = vl.explore(features, methods="pca", positions=1, space="joint", thumbnail=False)
        drawn = json.loads(chart.to_json())
        assert (drawn["title"].get("subtitle") == "random weights") is random
    colours = drawn["encoding"]["color"]
    assert colours["sort"] is None, "the first dataset is the first colour, as in `scatter`"
    assert len(set(colours["scale"]["range"])) == colours["legend"]["symbolLimit"] == 30


def test_captioned_images_without_classes_are_drawn() -> None:
    """Labels of -1 name no class; nothing is of the same one."""
    values = np.random.default_rng(0).normal(size=(6, 4))
    features = vl.LayerFeatures.from_arrays(
        {"1": values}, {"1": values}, pairs=range(6), space="joint", class_names=["none"]
    )
    none = np.full(6, -1)
    features = replace(
        features,
        vision=replace(features["vision"], labels=none),
        text=replace(features["text"], labels=none),
        class_names=(),
    )
    ids = features["vision"].ids
    images = {name: np.zeros((8, 8, 3), np.uint8) for name in ids}
    ax = vl.plots.neighbours(features, 2, space="joint", data=images)
    assert ax.get_title(loc="left") == f"Nearest to “{ids[2]}”"
    assert not any(to_hex(patch.get_edgecolor()) == "#007e5d" for patch in ax.patches)
    assert not nearest(features, 2, space="joint")["same_class"].any()
    table = project(features, 1, tower="both", space="joint")
    assert len(table) == 12 and set(table["class"]) == {""}
    with pytest.raises(UserError, match="no classes; colour='dataset' or 'modality'"):
        vl.plots.scatter(features, 1, space="joint", colour="class")


def test_explore_shows_itself_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="needs the extra 'notebooks'")
    chart = vl.explore(planted(), methods=["pca"], thumbnail=False, space="joint")
    shown = html.unescape(chart._repr_mimebundle_()["text/html"])
    assert "vegaEmbed(" in shown, "the page inside the frame draws it"
    assert not re.search(r"""(src|href)=["']?https?:""", shown)
    chart.save(tmp_path / "points.html")
    assert all("cdn.jsdelivr" not in s for s in (shown, (tmp_path / "points.html").read_text()))


def inline(chart: dict, data: dict) -> list[dict]:
    """Rows of a chart's data, which Altair keeps by name beside the chart."""
    return data["values"] if "values" in data else chart["datasets"][data["name"]]
