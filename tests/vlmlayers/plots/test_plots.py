"""Figures draw what the table says, in both towers, at any depth, and import no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from score_tables import DATASETS, curve_rows, full, pair_rows, planted, row, step, table

from vlmlayers import plots
from vlmlayers.errors import UserError
from vlmlayers.plots.comparison import run_curves
from vlmlayers.plots.outcomes import drop_overlapping_texts
from vlmlayers.plots.saving import slug
from vlmlayers.plots.style import OPEN_ALPHA, axis_label, category, short_names
from vlmlayers.positions import TOWERS
from vlmlayers.scores.summaries import (
    agreement,
    curves,
    dataset_names,
    metrics_by_shape,
    over_datasets,
)
from vlmlayers.selection import LayerChoice, select

OUTCOMES = pd.DataFrame(
    [
        {
            "placement": f"v{i}-12",
            "base": 80 - i,
            "novel": 60 + i,
            "hm": 70.0 + i / 10,
            "hm_low": 69.0,
            "hm_high": 72.0,
            "chosen": i == 5,
            "parameters": 1000 * (13 - i),
            "predicted": i / 12,
        }
        for i in range(1, 13)
    ]
)


def line(ax: Axes, label: str) -> np.ndarray:
    found = next(one for one in ax.lines if one.get_label() == label)
    return np.asarray(found.get_xydata())


def test_curves_draw_the_values_of_the_table() -> None:
    scores = planted(seeds=(0, 1))
    ax = plots.layer_curves(scores, choice=select(scores, resamples=20))
    xy = line(ax, "Vision")
    assert len(xy) == 14 and xy[1, 0] == 1 and np.all(np.diff(xy[:, 0]) > 0)
    assert xy[1:5, 1].tolist() == [0.4] * 4 and xy[5:, 1].tolist() == [0.9] * 9
    assert line(ax, "Chance")[:, 1].tolist() == [0.1, 0.1]
    marked = {one.get_label(): one for one in ax.lines if str(one.get_label()).startswith("_")}
    assert list(marked) == [f"_{t} {b} firm" for t in ("vision", "text") for b in range(5, 13)]
    assert list(marked["_vision 5 firm"].get_xdata()) == [4.5, 5.5]
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    axis = ax.get_window_extent()
    strips = [one.get_window_extent() for one in marked.values()]
    assert all(box.y1 <= axis.y0 for box in strips), "under the axis, not over the curves"
    labels = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert not any(box.overlaps(label) for box in strips for label in labels)
    assert "ccuracy" in ax.get_ylabel()


def test_where_no_metric_is_named_one_is_drawn_that_the_table_has() -> None:
    """Of a single dataset there is no dataset accuracy."""
    scores = full()
    assert plots.layer_curves(scores).get_ylabel() == "Dataset accuracy (linear probe)"
    kept = scores[~scores["metric"].str.startswith("dataset_accuracy")]
    drawn = next(name for name in kept["metric"].unique() if name != "cka_debiased")
    assert plots.layer_curves(kept).get_ylabel() == axis_label(drawn)
    with pytest.raises(UserError, match="the score table is empty"):
        plots.layer_curves(scores.head(0))


def test_what_shared_prompts_leave_possible_is_drawn() -> None:
    scores = planted()
    ax = plots.layer_curves(scores)
    assert not any("possible" in str(one.get_label()) for one in ax.lines)
    of_text = (scores["metric"] == "dataset_accuracy") & (scores["tower"] == "text")
    scores.loc[of_text, "options"] += ";ceiling=0.75"
    assert line(plots.layer_curves(scores), "Most possible, text")[:, 1].tolist() == [0.75] * 2


def test_chance_is_drawn_per_tower_and_position_where_it_differs() -> None:
    """Rank has another chance for 300 images than for 10 texts; a relative gap one per position."""
    values = step(12, 5)
    vision = curve_rows("effective_rank", "vision", values, null=20.0)
    text = curve_rows("effective_rank", "text", values, null=5.0)
    ax = plots.layer_curves(table(vision, text), "effective_rank")
    assert "Chance" not in ax.get_legend_handles_labels()[1]
    assert set(line(ax, "Chance, vision")[:, 1]) == {20.0}
    assert set(line(ax, "Chance, text")[:, 1]) == {5.0}
    for number, one in enumerate(vision):
        one["null"] = 0.5 + number / 100
    ax = plots.layer_curves(table(vision), "effective_rank")
    assert np.allclose(line(ax, "Chance")[:, 1], [one["null"] for one in vision])


def test_chance_of_datasets_that_have_their_own_is_a_band_between_them() -> None:
    values = step(12, 5)
    rows = [curve_rows("class_accuracy", "vision", values, dataset=name, null=null)
            for name, null in (("digits", 0.1), ("shapes", 0.3))]  # fmt: skip
    ax = plots.dataset_curves(table(*rows), "class_accuracy")
    assert line(ax, "Chance")[:, 1].tolist() == pytest.approx([0.2, 0.2])
    (band,) = ax.patches
    drawn = band.get_path().transformed(band.get_patch_transform()).vertices[:, 1]
    assert (drawn.min(), drawn.max()) == pytest.approx((0.1, 0.3))


def test_mean_over_datasets_keeps_the_order_where_one_lacks_a_position() -> None:
    """A value that does not exist at `embed` of one dataset must not shift its other positions."""
    whole = curve_rows("effective_rank", "text", step(12, 5), dataset="digits")
    lacking = curve_rows("effective_rank", "text", step(12, 5), dataset="shapes")
    scores = table([one for one in lacking if one["position"] != "embed"], whole)
    frame = over_datasets(curves(scores, "effective_rank"))
    assert frame["position"].tolist() == [one["position"] for one in whole]
    xy = line(plots.layer_curves(scores, "effective_rank"), "Text")
    assert np.all(np.diff(xy[:, 0]) > 0)


def test_plots_name_the_nearest_tower_and_refuse_a_matrix_of_partners() -> None:
    scores = full()
    for draw in (plots.gap_curves, plots.agreement_matrix, plots.dataset_heatmap):
        with pytest.raises(UserError, match="unknown tower 'visoin'; did you mean 'vision'"):
            draw(scores, tower="visoin")
    partners = scores[(scores["metric"] == "centroid_gap")]
    with pytest.raises(UserError, match="partner only, which is not a matrix"):
        plots.agreement_matrix(partners, "centroid_gap")


def test_only_the_sweep_is_joined() -> None:
    frame = OUTCOMES.assign(kind=["start"] * 3 + ["random", "start+paper"] + ["lower"] * 7)
    ax = plots.placement_sweep(frame)
    joined = next(one for one in ax.lines if one.get_label() == "Harmonic mean")
    assert joined.get_xdata().tolist() == [0, 1, 2, 3] and joined.get_linestyle() == "-"
    apart = [one for one in ax.lines if one.get_linestyle() == "None"]
    assert [one.get_xdata().tolist() for one in apart] == [list(range(4, 12))] * 3
    # A table sorted by what it found, as the recorded ones are: the line would rise or fall by it.
    plain = frame.drop(columns="chosen").sort_values("hm", ascending=False)
    plain["kind"] = plain["kind"].mask(plain["placement"] == "v5-12", "start+paper+chosen")
    untrained = plain.head(1).assign(placement="zero-shot", kind="zero-shot", hm=99.0)
    again = plots.placement_sweep(pd.concat([untrained, plain]))
    joined = next(one for one in again.lines if one.get_label() == "Harmonic mean")
    assert joined.get_ydata().tolist() == [70.1, 70.2, 70.3, 70.5]
    labels = [label.get_text() for label in again.get_xticklabels()]
    assert len(labels) == 12 and labels[:4] == [f"v{i}–12" for i in (1, 2, 3, 5)]
    (shaded,) = [one.get_x() for one in again.patches]
    assert shaded == pytest.approx(3 - 0.4), "the chosen one"
    (band,) = again.collections[0].get_paths()
    assert set(band.vertices[:, 1]) == {69.0, 72.0}, "the interval of the table"
    costs = plots.cost(plain)
    assert costs.get_legend_handles_labels()[1] == ["Placement", "Published", "Chosen"]
    for shown, counts in (
        (costs, [11, 1, 1]),  # the published one is chosen as well
        (plots.cost(frame.assign(chosen=frame.index == 0)), [10, 1, 1]),
    ):
        points = [one for one in shown.collections if isinstance(one, PathCollection)]
        assert [len(one.get_offsets()) for one in points] == counts
    assert costs.xaxis.get_major_formatter()(3000, 0) == "3", "in thousands"
    ax = plots.placement_sweep(frame.assign(sweep=False, placement="v1-12,t1-12").head(1))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1–12"]
    assert len(ax.get_legend_handles_labels()[1]) == 3


def test_points_of_trained_placements_have_intervals_and_keep_a_label_at_the_edge() -> None:
    few = OUTCOMES.iloc[[0, 5, 11]].assign(hm_low=[68.0, 69.0, 70.0])
    ax = drop_overlapping_texts(plots.cost(few))
    segments = next(one for one in ax.collections if isinstance(one, LineCollection))
    assert [one[:, 1].tolist() for one in segments.get_segments()] == [
        [low, 72.0] for low in (68.0, 69.0, 70.0)
    ]
    labels = {text.get_text(): text.get_ha() for text in ax.texts}
    assert set(labels) == {"v1–12", "v6–12", "v12"}  # the first has the most parameters
    assert labels["v1–12"] == "right" and labels["v12"] == "left"
    named = plots.predicted_vs_trained(
        few.rename(columns={"predicted": "metric:class_accuracy"}), "metric:class_accuracy"
    )
    assert named.get_xlabel() == "Class accuracy (linear probe), mean of blocks"


@pytest.mark.parametrize("gap", [100, 300, 600, 1200, 2400])
def test_no_label_of_the_cost_figure_covers_another_points_marker(gap: int) -> None:
    """The rim of a marker counts, not its centre alone."""
    points = OUTCOMES.iloc[[0, 4, 5, 6, 11]].assign(
        parameters=[1000, 6000, 6000 + gap, 6000 + 2 * gap, 12000],
        hm=[70.0, 70.5, 70.5, 70.5, 71.0],
    )
    ax = drop_overlapping_texts(plots.cost(points.drop(columns=["hm_low", "hm_high"])))
    figure: Any = ax.figure
    figure.canvas.draw()
    dots = [
        (ax.transData.transform(at), np.sqrt(size) / 2 * figure.dpi / 72)
        for drawn in ax.collections
        if isinstance(drawn, PathCollection)
        for at, size in zip(drawn.get_offsets(), np.resize(drawn.get_sizes(), len(points)))
    ]
    assert len(dots) == len(points) and ax.texts
    for text in ax.texts:
        box = text.get_window_extent()
        own: Any = text
        for at, radius in dots:
            if not np.allclose(at, ax.transData.transform(own.xy)):
                rim = [at + 0.9 * radius * np.array([np.cos(a), np.sin(a)]) for a in range(7)]
                assert not any(box.contains(*one) for one in [at, *rim]), text.get_text()


def test_the_chosen_and_the_best_placement_keep_their_labels_in_any_crowd() -> None:
    """Eleven points on a spot, the chosen among them, the best at the upper right corner."""
    points = OUTCOMES.assign(chosen=[i == 3 for i in range(12)], hm_low=None, hm_high=None)
    points["predicted"] = [0.5 + i / 500 for i in range(11)] + [1.0]
    points["hm"] = [70 + i / 500 for i in range(11)] + [71.0]
    ax = drop_overlapping_texts(plots.predicted_vs_trained(points.drop(columns="hm_low")))
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert {"v4–12", "v12"} <= boxes.keys() and len(boxes) < 12
    assert not any(a is not b and a.overlaps(b) for a in boxes.values() for b in boxes.values())
    frame = ax.get_window_extent()
    for name in ("v4–12", "v12"):
        assert frame.x0 <= boxes[name].x0 and boxes[name].x1 <= frame.x1


def test_a_mean_over_fewer_datasets_at_one_position_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = full()
    plots.layer_curves(scores, "class_accuracy")
    assert not caplog.text
    hard = (scores["dataset"] == DATASETS[0]) & (scores["position"] == "7")
    plots.layer_curves(
        scores[~(hard & (scores["metric"] == "class_accuracy") & (scores["tower"] == "vision"))],
        "class_accuracy",
    )
    assert f"class_accuracy of the vision tower at 7 is a mean without {DATASETS[0]}" in caplog.text


def test_unequal_towers_share_relative_depth() -> None:
    ax = plots.layer_curves(full(24, 12), "class_accuracy")
    assert ax.get_xlabel() == "Relative depth"
    vision, text = line(ax, "Vision"), line(ax, "Text")
    assert vision[24, 0] == text[12, 0] == 24
    assert vision[-1, 0] == text[-1, 0] > 24


def test_interval_joins_items_and_seeds() -> None:
    scores = planted(seeds=(0, 1), half=0.03)
    seed = scores["seed"] == 1
    for column in ("value", "low", "high"):
        scores.loc[seed, column] += 0.02
    row = curves(scores, "dataset_accuracy").iloc[3]
    spread = 1.959963984540054 * np.std([0.0, 0.02], ddof=1)
    assert row["value"] == pytest.approx(0.41)
    assert row["high"] - row["value"] == pytest.approx(np.hypot(0.03, spread))
    assert row["seeds"] == 2


def test_matrix_and_heatmap_show_each_cell_where_it_belongs() -> None:
    scores = full(24, 12)
    ax = plots.agreement_matrix(scores, dataset=DATASETS[0])
    grid = np.asarray(ax.images[0].get_array())
    assert grid.shape == (24, 12) and grid[3, 5] == pytest.approx(0.1 + 0.02 * (4 + 6))
    heat = plots.dataset_heatmap(scores, "class_accuracy", tower="text")
    labels = [tick.get_text() for tick in heat.get_yticklabels()]
    assert labels == list(DATASETS)
    assert np.asarray(heat.images[0].get_array()).shape == (3, 14)


def test_every_figure_draws_on_given_axes_and_returns_them() -> None:
    import matplotlib.pyplot as plt

    scores = full()
    choice = select(scores, resamples=20)
    for draw, arguments in (
        (plots.layer_curves, (scores,)),
        (plots.gap_curves, (scores,)),
        (plots.dataset_curves, (scores, "class_accuracy")),
        (plots.agreement_matrix, (scores,)),
        (plots.dataset_heatmap, (scores,)),
        (plots.selection_frequency, (choice,)),
        (plots.placement_sweep, (OUTCOMES,)),
        (plots.predicted_vs_trained, (OUTCOMES,)),
        (plots.cost, (OUTCOMES,)),
    ):
        figure, ax = plt.subplots()
        assert draw(*arguments, ax=ax) is ax  # type: ignore[operator]
        assert ax.has_data() or ax.images
        plt.close(figure)


def test_random_weights_are_announced_on_the_figure() -> None:
    scores = full(weights="random")
    for ax in (
        plots.layer_curves(scores),
        plots.agreement_matrix(scores),
        plots.dataset_heatmap(scores),
        plots.selection_frequency(select(scores, resamples=20)),
        plots.dataset_curves(scores, "class_accuracy"),
        plots.placement_sweep(OUTCOMES.assign(weights="random")),
        plots.cost(OUTCOMES.assign(weights="random")),
    ):
        assert announced(ax)
    for ax in (plots.layer_curves(full()), plots.placement_sweep(OUTCOMES)):
        assert not announced(ax)


def announced(ax: Axes) -> bool:
    """Whether the axes say so, outside the data: above them, or in the legend above them."""
    legend = ax.get_legend()
    words = [ax.get_title(loc="right"), legend.get_title().get_text() if legend else ""]
    return "random weights" in words


def test_crowded_ends_of_a_matrix_leave_room_for_the_last() -> None:
    for depth, expected in ((24, ["", "Proj"]), (6, ["Final", "Proj"])):
        names = [*map(str, range(1, depth + 1)), "final", "proj"]
        one = pair_rows("cka_debiased", depth + 2, depth + 2, lambda i, j: i + j)
        for cell in one:
            for key in ("position", "other_position"):
                cell[key] = names[int(str(cell[key])) - 1]
        ax = plots.agreement_matrix(table(one), "cka_debiased")
        assert [label.get_text() for label in ax.get_yticklabels()][-2:] == expected


@pytest.mark.parametrize(("given", "name"), [("x.png", "x"), ("v1.2", "v1.2"), ("x", "x")])
def test_a_suffix_is_not_doubled_in_the_name_of_a_file(
    given: str, name: str, tmp_path: Path
) -> None:
    ax = plots.layer_curves(full())
    found = plots.save_figure(ax, tmp_path / given, full(), formats="png")
    assert found == [tmp_path / f"{name}.png", tmp_path / f"{name}.csv"]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in found}


def test_saved_files_are_complete_and_reproducible(tmp_path: Path) -> None:
    scores = full()
    data = curves(scores, "dataset_accuracy")
    first = plots.save_figure(plots.layer_curves(scores), tmp_path / "a" / "x", data)
    second = plots.save_figure(plots.layer_curves(scores), tmp_path / "b" / "x", data)
    assert [path.suffix for path in first] == [".svg", ".png", ".pdf", ".csv"]
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes(), one.suffix
    assert pd.read_csv(first[-1])["value"].tolist() == pytest.approx(data["value"].tolist())
    with pytest.raises(UserError, match="did you mean 'png'"):
        plots.save_figure(plots.layer_curves(scores), tmp_path / "x", formats=("svg", "pngg"))
    assert not (tmp_path / "x.svg").exists()
    with pytest.raises(UserError, match="figure takes a figure, or axes of one, not an array"):
        plots.save_figure(np.zeros(2), tmp_path / "x")


def test_several_axes_are_saved_as_the_figure_that_they_are_in(tmp_path: Path) -> None:
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    right.subplots()
    axes = left.subplots(1, 2)
    of = {"figure": figure, "several": axes, "one": axes[1], "other": right.axes[0]}
    files = [plots.save_figure(one, tmp_path / name, formats="png")[0] for name, one in of.items()]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_figure_is_drawn_once_for_its_layout_and_once_for_each_file(tmp_path: Path) -> None:
    drawn = []

    class Counted(Line2D):
        def draw(self, renderer: object) -> None:
            drawn.append(type(renderer).__name__)

    figure = Figure(layout="constrained")
    figure.subplots().add_line(Counted([0, 1], [0, 1]))
    plots.save_figure(figure, tmp_path / "x", formats=("svg", "png", "pdf"))
    assert len(drawn) == 4, drawn


def test_an_overview_lists_positions_against_metrics() -> None:
    from vlmlayers.scores.summaries import overview

    scores = full()
    wide = overview(scores)
    assert wide.index.tolist() == ["embed", *map(str, range(1, 13)), "proj"]
    curve = curves(scores, "class_accuracy")
    mean = curve[(curve.tower == "text") & (curve.position == "7")].value.mean()
    assert wide.loc["7", ("class_accuracy", "text")] == pytest.approx(mean)
    within = scores[scores.other_tower != "text"]
    assert len(overview(within)), "agreement within a tower is left out"


def test_summaries_know_shapes_and_datasets() -> None:
    scores = full()
    shapes = metrics_by_shape(scores)
    assert shapes["matrix"] == ["cka_debiased"] and "centroid_gap" in shapes["curve"]
    assert dataset_names(scores) == list(DATASETS)
    cells = agreement(scores, dataset=DATASETS[1])
    assert len(cells) == 144 and list(cells.iloc[12])[:2] == ["2", "1"]
    assert slug("A/b <c>") == "a-b-c"


def test_the_closest_pairs_of_two_splits_poolings_or_models_are_no_matrix() -> None:
    found = {"other_tower": "text", "dataset": "digits"}
    for column, two in (
        ("split", ("train", "val")),
        ("pooling", ("cls", "mean")),
        ("model", ("small", "large")),
        ("weights", ("openai", "own.pt")),
    ):
        pairs = [
            row("mutual_knn_max", "vision", "12", 12, 0.5, **found, **{column: one},
                other_position=place)
            for one, place in zip(two, ("11", "12"))
        ]  # fmt: skip
        assert metrics_by_shape(table(pairs)) == {"curve": ["mutual_knn_max"], "matrix": []}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plots.layer_curves(planted(), "dataset_acuracy"),
            "did you mean 'dataset_accuracy'",
        ),
        (
            lambda: plots.layer_curves(full(), "skip_accuracy_drop"),
            "no skip_accuracy_drop: examine the model, or name one of dataset_accuracy, ",
        ),
        (lambda: plots.gap_curves(full(), tower="text"), "no value on the text tower"),
        (
            lambda: plots.dataset_heatmap(full(), "centroid_gap", tower="text"),
            "no value on the text",
        ),
        (
            lambda: plots.agreement_matrix(full(), tower="text"),
            "not measured between text and text",
        ),
        (lambda: plots.layer_curves(full(), "class_accuracy", dataset="digit"), "mean 'digits'"),
        (lambda: plots.selection_frequency(select(planted(), resamples=0)), "resamples above 0"),
        (lambda: plots.placement_sweep(OUTCOMES.drop(columns="hm")), "lacks hm"),
        (lambda: plots.placement_sweep(pd.concat([OUTCOMES] * 2)), "several rows per placement"),
        (lambda: plots.cost(OUTCOMES.iloc[:0]), "lacks rows"),
        (lambda: by_dataset(palette={"digit": "red"}), "no colour for 'digits'; it has digit"),
        (lambda: by_dataset(palette="tab11"), "palette takes the name .*, not 'tab11'"),
        (lambda: by_dataset(palette=["rde"]), r"palette takes .*, not \['rde'\]"),
        (lambda: by_dataset(palette=["red"]), "palette has 1 colour, and there are "),
        (lambda: by_dataset(palette=3), "palette takes .*, not 3"),
        (lambda: by_dataset(palette="tab10", color="red"), "name a hue, and no color beside it"),
        (lambda: by_dataset(color="red"), "color would draw every dataset alike"),
        (lambda: by_dataset(palette="tab10", hue=None), "palette colours the values of hue"),
        (lambda: by_dataset(color="rde"), "color is 'rde', which is no colour"),
        (
            lambda: plots.amount_curves(OUTCOMES.assign(times=1), [by_dataset()] * 2),
            "3 axes, not 2",
        ),
        (lambda: plots.dataset_curves(full()[["value"]], "x"), "lacks the columns model, weights"),
        (lambda: plots.save_figure(plots.layer_curves(full()), "x", formats=()), "no format is"),
        (lambda: plots.layer_curves(full().assign(low="x")), "'x' in the column low, where a num"),
        (lambda: plots.layer_curves(full().drop(columns="null")), "lacks the columns null"),
        (
            lambda: plots.layer_curves(full(), choice=LayerChoice((13,), (5,), "explicit")),
            "of 13 vision blocks or more, and 12 are drawn",
        ),
        (
            lambda: plots.agreement_matrix(
                full(), choice=select(planted(12, 24, (5, 9)), resamples=20)
            ),
            "of 24 text blocks or more, and 12 are drawn",
        ),
        (lambda: plots.layer_curves(full().assign(low=2.0)), "low must not exceed high"),
        (
            lambda: select((one := full()).assign(value=100 * one["value"])),
            "as dataset_accuracy at vision .*, whose values lie from 0 to 1",
        ),
        (
            lambda: select(full().assign(tower="Vision")),
            "unknown tower 'Vision' in the score table",
        ),
        (
            lambda: select((one := full()).assign(metric=one["metric"].where(one.index > 2))),
            "3 rows of the score table name no metric",
        ),
        *(
            (partial(draw, full().assign(value=np.nan), metric), f"every value of '{metric}'")
            for draw, metric in (
                (plots.layer_curves, "dataset_accuracy"),
                (plots.dataset_curves, "class_accuracy"),
                (plots.gap_curves, "centroid_gap"),
                (plots.dataset_heatmap, "class_accuracy"),
                (plots.agreement_matrix, "cka_debiased"),
            )
        ),
        (
            lambda: plots.dataset_curves(
                (scores := full()).assign(value=scores["value"].where(scores["tower"] == "text")),
                "class_accuracy",
            ),
            "'class_accuracy' has no value on the vision tower",
        ),
        (
            lambda: plots.placement_sweep(OUTCOMES.assign(base=np.nan, novel=np.nan, hm=np.nan)),
            "no row of the table has a number in base or novel or hm",
        ),
        (lambda: plots.cost(OUTCOMES.assign(parameters=np.inf)), "a number in parameters"),
        (
            lambda: plots.amount_curves(
                OUTCOMES.assign(times=1, base=np.nan, novel=np.nan, hm=np.nan)
            ),
            "a number in base or novel or hm",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]


def test_a_table_without_the_optional_columns_is_drawn() -> None:
    scores = full().drop(columns=["other_tower", "other_position", "options"])
    assert plots.layer_curves(scores).get_legend_handles_labels()[1][:2] == ["Vision", "Text"]


def by_dataset(**options: Any) -> Any:
    given: dict[str, Any] = {"hue": "dataset"} | options
    return plots.layer_curves(full(), "class_accuracy", **given)


def test_a_refused_palette_leaves_no_empty_figure_for_a_notebook_to_show() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    with pytest.raises(UserError, match="palette has 1 colour"):
        by_dataset(palette=["red"])
    assert plt.get_fignums() == before


def test_importing_plots_imports_no_torch() -> None:
    code = "import sys, vlmlayers.plots; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_of_a_table_that_ends_early_the_axis_goes_on_to_the_last_block() -> None:
    """Of blocks 1 to 6 of 12 the sixth is half way up, beside a model that is scored whole."""
    whole = planted(12, 12, (5, 5))
    blocks = whole["position"].isin([str(block) for block in range(1, 7)])
    part = whole[blocks & (whole["other_position"] == "")].assign(model="part")
    ax = plots.layer_curves(pd.concat([whole, part]), hue="model", tower="vision")
    assert line(ax, "part")[-1, 0] == line(ax, "toy")[6, 0] == 6
    assert line(plots.layer_curves(part, tower="vision"), "Vision")[:, 0].tolist() == [*range(1, 7)]
    assert select(part, "paper").vision == tuple(range(5, 13))


def test_lines_of_datasets_say_which_pooling_is_read(caplog: pytest.LogCaptureFixture) -> None:
    rows = full(4, 4).query("metric == 'class_accuracy'")
    both = pd.concat([rows, rows.assign(pooling="mean")], ignore_index=True)
    plots.layer_curves(both, "class_accuracy", hue="dataset")
    assert "class_accuracy: pooling cls is read, not mean" in caplog.text


def test_a_placement_that_says_nothing_of_the_choice_is_not_chosen() -> None:
    other = OUTCOMES.head(1).assign(placement="v12").drop(columns="chosen")
    ax = plots.predicted_vs_trained(pd.concat([OUTCOMES, other], ignore_index=True))
    counts = {one.get_label(): len(one.get_offsets()) for one in ax.collections}
    assert counts["Chosen"] == 1 and counts["Placement"] == 12


def test_a_choice_is_marked_on_its_own_model(caplog: pytest.LogCaptureFixture) -> None:
    deep, flat = planted(12, 12, (5, 5)), planted(6, 6, (3, 3)).assign(model="flat")
    of_flat = replace(select(flat, resamples=20), vision=(5, 6))
    for tables in ([deep, flat], [flat, deep]):
        ax = plots.layer_curves(pd.concat(tables), hue="model", tower="vision", choice=of_flat)
        marks = {one.get_label(): list(one.get_xdata()) for one in ax.lines}
        assert marks["_vision 6 firm"] == [11, 13], "at the end, as its curve"
    assert not caplog.messages
    other = replace(of_flat, evidence={**of_flat.evidence, "model": "another"})
    with pytest.raises(UserError, match="the choice is of none of them"):
        plots.layer_curves(pd.concat([deep, flat]), hue="model", tower="vision", choice=other)
    plots.dataset_heatmap(full(6, 6), choice=other)
    assert "was made from scores of another (toy.safetensors), not of toy" in caplog.text


def test_a_choice_of_other_weights_of_one_name_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """As of a model in memory, before it was tuned."""
    scores = planted(6, 6, (3, 3))
    scores.attrs["weights_hash"] = "before"
    choice = select(scores, resamples=20)
    plots.layer_curves(scores, tower="vision", choice=choice)
    assert not caplog.messages
    scores.attrs["weights_hash"] = "after"
    plots.layer_curves(scores, tower="vision", choice=choice)
    assert "(toy.safetensors, before), not of toy (toy.safetensors, after)" in caplog.text


def test_chance_of_two_models_is_read_position_by_position() -> None:
    rising = curve_rows("effective_rank", "vision", step(12, 5))
    for number, one in enumerate(rising):
        one["null"] = number / 10
    short = [dict(one, model="short") for one in rising if one["position"] != "embed"]
    ax = plots.layer_curves(table(rising, short), "effective_rank", hue="model")
    assert np.allclose(line(ax, "Chance")[:, 1], [one["null"] for one in rising])
    flat = pd.concat([planted(12, 12), planted(24, 12, (9, 5)).assign(model="deep")])
    drawn = plots.layer_curves(flat, hue="model", tower="vision").get_legend_handles_labels()[1]
    assert "Chance" in drawn, "the same at any depth"


def test_many_datasets_are_told_apart_by_look_and_name() -> None:
    looks = [category(number) for number in range(50)]
    assert len({(one["color"], str(one["linestyle"])) for one in looks}) == 50
    rows = curve_rows("class_accuracy", "vision", step(12, 5))
    names = [f"my_very_long_dataset_{year}" for year in range(2001, 2028)]
    many = table(*([dict(one, dataset=name) for one in rows] for name in names))
    lines = plots.layer_curves(many, "class_accuracy", hue="dataset", tower="vision").lines[:27]
    assert len({(one.get_color(), str(one.get_linestyle())) for one in lines}) == 27
    for ax in (plots.dataset_curves(many, "class_accuracy"), plots.dataset_heatmap(many)):
        legend = ax.get_legend()
        shown = [one.get_text() for one in (legend.texts if legend else ax.get_yticklabels())]
        assert len(set(shown)) >= 27 and "my_very_…_dataset_2001"[-5:] in shown[0]
    alike = ["a" * 40 + "b" * 40 + str(number) + "c" * 40 for number in range(3)]
    assert len({*short_names(alike)}) == 3 and max(map(len, short_names(alike))) <= 18
    assert short_names(["short", "a name of twenty let"]) == ["short", "a name of twenty …"]


def test_hue_label_and_colour_draw_several_lines() -> None:
    """Two models in one table, or two calls on the same axes, as seaborn has it."""
    one, two = planted(12, 12), planted(24, 12, (9, 5)).assign(model="deep")
    ax = plots.layer_curves(pd.concat([one, two]), hue="model", tower="vision")
    assert ax.get_legend_handles_labels()[1][:2] == ["toy", "deep"]
    assert line(ax, "toy")[12, 0] == line(ax, "deep")[24, 0], "last blocks stand together"
    assert ax.get_xlabel() == "Relative depth"
    with pytest.raises(UserError, match="2 models"):
        plots.layer_curves(pd.concat([one, two]))
    ax = plots.layer_curves(one, tower="vision", label="before", color="black")
    again = plots.layer_curves(one, tower="vision", label="after", color="red", ax=ax)
    assert again is ax and {"before", "after"} <= set(ax.get_legend_handles_labels()[1])
    ax = plots.layer_curves(
        full(), "class_accuracy", hue="dataset", tower="vision", palette="tab10"
    )
    names = ax.get_legend_handles_labels()[1]
    assert [name for name in names if name != "Chance"] == list(DATASETS)
    both = pd.concat([one, one.assign(pooling="mean", value=0.5 * one["value"])])
    ax = plots.layer_curves(both, hue="pooling", tower="vision")
    assert line(ax, "mean")[-1, 1] == pytest.approx(0.5 * line(ax, "cls")[-1, 1])
    # The other tower has another pooling, and is not drawn.
    ax = plots.layer_curves(one, hue="pooling", tower="vision", color="black")
    assert "cls" in ax.get_legend_handles_labels()[1]


def test_lines_of_a_palette_of_few_colours_are_told_apart_by_their_dash() -> None:
    """Seaborn's `deep` begins again after ten colours, `Set2` after eight."""
    rows = full()[full()["dataset"] == DATASETS[0]]
    many = pd.concat([rows.assign(dataset=f"d{number}") for number in range(12)])
    for palette, colours in (("deep", 10), ("Set2", 8)):
        ax = plots.layer_curves(
            many, "class_accuracy", hue="dataset", tower="vision", palette=palette
        )
        drawn = [(one.get_color(), one.get_linestyle()) for one in ax.get_lines()
                 if str(one.get_label()).startswith("d")]  # fmt: skip
        assert len({colour for colour, _ in drawn}) == colours
        assert len(set(drawn)) == len(drawn) == 12


@pytest.mark.parametrize("ignore_index", [True, False])
def test_one_pooling_of_two_is_named_whatever_the_labels_of_rows(
    ignore_index: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one = planted(12, 12)
    both = pd.concat([one, one.assign(pooling="mean")], ignore_index=ignore_index)
    plots.layer_curves(both)
    assert "dataset_accuracy: pooling cls is read, not mean; " in caplog.text


@pytest.mark.parametrize("count", [3, 27])
def test_marks_of_chosen_blocks_never_cover_labels(count: int) -> None:
    scores = full()
    names = [f"a dataset of a long name {number}" for number in range(count)]
    rows = scores[scores["dataset"] == DATASETS[0]]
    many = pd.concat([rows.assign(dataset=name) for name in names])
    choice = select(scores, resamples=20)
    for ax in (
        plots.dataset_heatmap(many, choice=choice),
        plots.agreement_matrix(many, choice=choice),
    ):
        ax.figure.draw_without_rendering()  # type: ignore[union-attr]
        marks = [one.get_window_extent() for one in ax.lines]
        texts = [text for text in (*ax.get_xticklabels(), *ax.get_yticklabels()) if text.get_text()]
        labels = [text.get_window_extent() for text in texts]
        assert marks and not any(mark.overlaps(label) for mark in marks for label in labels)


def test_names_of_many_datasets_leave_room_for_what_is_drawn() -> None:
    rows = full()
    rows = rows[rows["dataset"] == DATASETS[0]]
    names = [f"a dataset of a long name {number}" for number in range(27)]
    many = pd.concat([rows.assign(dataset=name) for name in names])
    for ax in (plots.gap_curves(many), plots.dataset_heatmap(many)):
        figure = ax.get_figure(root=True)
        assert figure is not None
        figure.draw_without_rendering()
        whole, drawn = figure.bbox, ax.get_window_extent()
        assert drawn.height / figure.dpi > 1.2 and drawn.width > 0.4 * whole.width
        seen = [ax.get_legend()] if ax.get_legend() else ax.get_yticklabels()
        boxes = [one.get_window_extent() for one in seen]
        assert all(box.x0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)


LONG = "a_model_or_dataset_of_a_name_of_more_than_sixty_characters_no_"


def on_page(ax: Axes) -> tuple[Any, Any, list[str]]:
    """Return the box of the axes in inches, and box and names of their legend, on the page."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    made = ax.get_legend()
    assert made is not None
    box, whole = made.get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
    inches = figure.dpi_scale_trans.inverted()
    return ax.get_window_extent().transformed(inches), box, [one.get_text() for one in made.texts]


@pytest.mark.parametrize("count", [1, 5, 8, 12])
def test_the_longest_names_stay_on_the_page_apart_and_beside_the_curves(count: int) -> None:
    rows = curve_rows("class_accuracy", "vision", step(12, 5))
    many = table(*([dict(one, dataset=f"{LONG}{k}") for one in rows] for k in range(count)))
    runs = curves(many, "class_accuracy").assign(run=lambda frame: frame["dataset"], dataset="*")
    for ax in (
        plots.dataset_curves(many, "class_accuracy"),
        plots.layer_curves(many, "class_accuracy", hue="dataset", tower="vision"),
        run_curves(runs, "class_accuracy"),
    ):
        axes, _, names = on_page(ax)
        assert axes.width > 2 and axes.height > 1
        assert len(set(names) - {"Chance"}) == count


def test_a_name_is_not_cut_between_a_dollar_and_its_backslash() -> None:
    assert short_names(["x" * 16 + r"\$y" + "z" * 9]) == ["x" * 16 + r"\$…"]
    assert short_names([r"\$" * 18]) == [r"\$" * 18], "eighteen characters as drawn"


def test_a_choice_of_many_runs_of_blocks_is_named_on_the_page() -> None:
    towers = {t: {"depth": 48, "frequency": [0.5, 1.0, 1.0] * 16} for t in TOWERS}
    blocks = [block for block in range(1, 49) if block % 3 != 1]
    choice = LayerChoice(blocks, blocks, "threshold", {"towers": towers})
    axes, _, names = on_page(plots.selection_frequency(choice))
    assert axes.width > 2 and axes.height > 0.5
    assert all("2–3" in name and "47–48" in name for name in names)


def test_ends_of_the_bar_of_one_dataset_do_not_cover_each_other() -> None:
    scores = full()
    ax = plots.dataset_heatmap(scores[scores["dataset"] == DATASETS[0]])
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    labels = figure.axes[1].get_yticklabels()
    low, high = (one.get_window_extent() for one in labels)
    values = curves(scores, "class_accuracy", DATASETS[0]).query("tower == 'vision'")["value"]
    ends = [f"{values.min():.2g}", f"{values.max():.2g}"]
    assert not low.overlaps(high) and [one.get_text() for one in labels] == ends
    assert figure.axes[1].get_window_extent().width / figure.dpi > 0.03


def test_of_a_long_sweep_labels_are_left_out_and_the_chosen_one_stays() -> None:
    deep = pd.concat([OUTCOMES] * 4, ignore_index=True)
    deep["placement"] = [f"v{i}-48,t{i}-48" for i in range(1, 49)]
    deep["chosen"] = deep.index == 4
    ax = plots.placement_sweep(deep)
    named = [place for place, one in enumerate(ax.get_xticklabels()) if one.get_text()]
    assert named[:3] == [0, 4, 9] and min(np.diff(named)) == 3
    apart = "v1+3+5+7+9+11+13+15+17+19,t2+4+6+8+10+12"
    rest = pd.concat([OUTCOMES, OUTCOMES.tail(1).assign(placement=apart)], ignore_index=True)
    ax = plots.placement_sweep(rest)
    assert on_page(ax)[0].height > 1
    rest["chosen"] = rest["placement"] == apart
    rest["predicted"] = range(len(rest))
    ax = drop_overlapping_texts(plots.predicted_vs_trained(rest))
    assert on_page(ax)[0].width > 2
    assert any(text.get_text().startswith("v1+3+5") for text in ax.texts)


def test_a_users_style_hides_nothing_and_adds_nothing() -> None:
    """On dark ground dark marks turn light; markers and ticks of other figures stay out."""
    light = {name: "white" for name in ("text.color", "axes.labelcolor")}
    with mpl.rc_context(light):
        ax = plots.placement_sweep(OUTCOMES)
        assert (
            next(one for one in ax.lines if one.get_label() == "Harmonic mean").get_color()
            == "white"
        )
        assert {one.get_color() for one in plots.cost(OUTCOMES).texts} == {"white"}
    assert {one.get_color() for one in plots.cost(OUTCOMES).texts} == {"#444444"}
    with mpl.rc_context({"lines.marker": "x", "xtick.minor.visible": True}):
        scores = planted()
        ax = plots.layer_curves(scores, choice=select(scores, resamples=20))
    assert not len(ax.get_xticks(minor=True))
    strips = [one for one in ax.lines if str(one.get_label()).startswith("_")]
    assert strips and {one.get_marker() for one in strips} == {"None"}


def test_blocks_are_numbered_more_sparsely_where_a_users_letters_are_larger() -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    ax = plots.layer_curves(planted(), ax=figure.subplots(1, 2)[0])
    figure.draw_without_rendering()
    labels = [one for one in ax.get_xticklabels() if one.get_text()]
    boxes = [one.get_window_extent() for one in labels]
    assert len(labels) > 6
    assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:]))


def test_heat_maps_mark_open_blocks_pale() -> None:
    scores = full()
    frequency = [0.0] * 4 + [0.5] * 4 + [1.0] * 4
    evidence = {"towers": {t: {"depth": 12, "frequency": frequency} for t in ("vision", "text")}}
    choice = LayerChoice(range(6, 13), range(6, 13), "threshold", evidence)
    for ax, towers in (
        (plots.dataset_heatmap(scores, choice=choice), 1),
        (plots.agreement_matrix(scores, choice=choice), 2),
    ):
        marks = [(one.get_label().split(" ", 1)[1], one.get_alpha()) for one in ax.lines]
        assert sorted(marks) == sorted([("6-8 open", 0.3), ("9-12 firm", 1.0)] * towers)
        along = {one.get_label(): list(one.get_xdata()) for one in ax.lines}
        where = ax.get_xlabel().split()[0].lower()
        first = 5.5 if towers == 1 else 4.5  # `embed` comes before the blocks of a heat map
        assert along[f"_{where} 6-8 open"] == [first, first + 3], "whole cells"


def test_of_a_tower_in_doubt_the_chosen_blocks_alone_are_marked() -> None:
    """All of its blocks are open then, those that no resample chose as well."""
    scores = planted()
    frequency = [0.0] * 6 + [0.6] * 6
    towers = {t: {"depth": 12, "frequency": frequency, "notes": ["flat"]} for t in TOWERS}
    choice = LayerChoice(range(7, 13), range(10, 12), "threshold", {"towers": towers})
    ax = plots.layer_curves(scores, choice=choice)
    marked = [str(one.get_label()) for one in ax.lines if str(one.get_label()).startswith("_")]
    expected = [f"_vision {b} open" for b in range(7, 13)] + ["_text 10 open", "_text 11 open"]
    assert marked == expected
    bars = plots.selection_frequency(choice).patches
    edged = [bar.get_edgecolor()[3] > 0 and bar.get_linewidth() > 0 for bar in bars]
    assert edged == [b in choice.blocks(t) for t in TOWERS for b in range(1, 13)]
    assert {bar.get_facecolor()[3] for bar in bars} == {OPEN_ALPHA}


def test_figures_carry_the_warning_of_their_comparison_under_the_axis() -> None:
    warned = OUTCOMES.assign(warning="placements of 1 to 9 blocks are compared at one amount")
    for draw, words in (
        (plots.placement_sweep, "Warning: placements"),
        (plots.cost, "Trainable parameters (thousands) Warning: placements"),
    ):
        said = " ".join(draw(warned).get_xlabel().split("\n"))
        assert said == f"{words} of 1 to 9 blocks are compared at one amount"
        assert "Warning" not in draw(OUTCOMES.assign(warning="")).get_xlabel()
        assert "Warning" not in draw(OUTCOMES.assign(warning=None)).get_xlabel()
