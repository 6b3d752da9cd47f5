"""The figures of the paper: read tidy tables, arrange panels, draw with `vlmlayers.plots`, save."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vlmlayers import plots
from vlmlayers.figures.captions import JOINT, clauses, doubted, joined, mean_over, scored, trained
from vlmlayers.figures.inputs import (
    Folders,
    MissingTable,
    Seen,
    as_folders,
    provenance_beside,
    read,
    select,
    short,
)
from vlmlayers.figures.layout import (
    finish,
    legend_of_choice,
    mark_sweep,
    panels,
    save,
    shared_legend,
)
from vlmlayers.figures.outcomes import (
    compared_cells,
    marked,
    placement_means,
    predicted_means,
    read_validations,
    start_block,
    sweep,
)
from vlmlayers.figures.pooling import read_scores
from vlmlayers.placement import Placement
from vlmlayers.plots.outcomes import drop_overlapping_texts
from vlmlayers.plots.saving import with_source
from vlmlayers.plots.style import axis_label, category, label_text
from vlmlayers.positions import FINAL
from vlmlayers.scores.reading import Reading, ceiling, check_scores
from vlmlayers.scores.summaries import (
    DATASET_ACCURACIES,
    agreement,
    curves,
    dataset_readout,
    measured,
)
from vlmlayers.selection import LayerChoice

GAP_METRICS = ("pair_distance", "centroid_gap", "rmg")
SOURCE = ["model", "weights"]
AGREEMENT_METRICS = ("cka_debiased", "mutual_knn")
COST_PANELS = {
    "parameters": ("Parameters (M)", 1e6),
    "step_ms": ("Step (ms)", 1.0),
    "seconds": ("Training (s)", 1.0),
    "memory_mib": ("Memory (GiB)", 1024.0),
}


def fig1_dataset_recognition(tables: Folders, out: Path) -> list[Path]:
    """Draw how well the dataset is recognised at every position, mean and sd over seeds."""
    seen = Seen()
    scores = read_scores(tables, DATASET_ACCURACIES, seen)
    metric = dataset_readout(set(scores.metric)) or DATASET_ACCURACIES[0]
    scores = select(scores, metric, metric=metric)
    scores = scores[scores.position != FINAL]  # the paper's axis: Embed, 1..L, Proj
    models = list(by_model(scores))
    figure, axes = panels(len(models), 1, 1.9, "all")
    drawn, choices, doubts = [], [], {}
    for (name, part), ax in zip(models, axes):
        spread = seed_spread(check_scores(part))
        choice, doubts[name] = choice_of(part, tables, seen)
        choices.append(choice)
        plots.layer_curves(spread, metric, choice=choice, ax=ax)
        ax.set_ylabel("Dataset accuracy" if metric == DATASET_ACCURACIES[0] else axis_label(metric))
        finish(ax, name)
        if choice is not None:
            legend_of_choice(ax)
        place = ["tower", "dataset", "position"]
        seeds = spread.groupby(place)["seeds"].max()  # the curve of means knows of none
        points = curves(spread, metric)
        points["seeds"] = seeds[pd.MultiIndex.from_frame(points[place])].to_numpy()
        drawn.append(in_panel(points, part, name))
    shared_legend(figure, axes, 4)
    points = pd.concat(drawn)
    both = scores.tower.nunique() > 1
    marks = {
        "Mean over seeds; bands: ± one standard deviation over seeds": bool(
            (points.seeds > 1).any()
        ),
        "Dashed: chance": bool(points.null.notna().any()),
        "Dotted: the most possible, as datasets share prompts": any(
            ceiling(part, metric, tower) < 1
            for (_, part), tower in product(models, set(scores.tower))
        ),
        f"Strips: the chosen blocks{' of each tower' * both}": any(choices),
        **dict.fromkeys(doubted(doubts), True),
    }
    towers = "both towers" if both else f"the {scores.tower.iloc[0]} tower"
    opening = clauses(f"{axis_label(metric)} at every position of {towers}", marks)
    caption = scored(opening, scores, [metric])
    return save(figure, out, "fig1_dataset_recognition", drawn, caption)


def fig2_gap(tables: Folders, out: Path) -> list[Path]:
    """Draw distance and gap between images and texts at every position, one line per dataset."""
    whole = read_scores(tables, GAP_METRICS)
    scores = select(whole, "modality gap", metric=GAP_METRICS)
    models = list(by_model(scores))
    metrics = [name for name in GAP_METRICS if (scores.metric == name).any()]
    figure, axes = panels(len(metrics), len(models), 1.6, "row")
    # One legend is of all panels, of which some may lack a dataset.
    drawn, datasets = [], list(dict.fromkeys(scores.dataset))
    for ax, (metric, (name, part)) in zip(axes, product(metrics, models)):
        if not (part.metric == metric).any():
            ax.set_axis_off()
            continue
        part = check_scores(part)
        plots.gap_curves(part, metric, order=datasets, ax=ax)
        finish(ax, name if metric == metrics[0] else "", last=metric == metrics[-1],
               first=name == models[0][0])  # fmt: skip
        drawn.append(in_panel(curves(part, metric), part, name))
    words = "Joint space: final norm and projection applied at every position"
    shared_legend(figure, axes, 3 * len(models), words)
    points = pd.concat(drawn)
    bands = bool((points.low < points.high).any())
    opening = clauses(
        "Distance between images and texts at every position, one line per dataset",
        {"Bands: 95 % interval": bands, "Dashed and grey: chance, its mean and range over datasets":
         bool(points.null.notna().any())},
    )  # fmt: skip
    caption = scored(opening, scores, metrics, intervals=bands, more=JOINT, beside=whole)
    return save(figure, out, "fig2_gap", drawn, caption)


def fig3_agreement(tables: Folders, out: Path) -> list[Path]:
    """Draw the agreement of every vision position with every text position."""
    seen = Seen()
    whole = read_scores(tables, AGREEMENT_METRICS, seen)
    scores = select(whole, "agreement between towers", metric=AGREEMENT_METRICS)
    scores = select(scores, "agreement between towers", tower="vision", other_tower="text")
    models = list(by_model(scores))
    metrics = [name for name in AGREEMENT_METRICS if (scores.metric == name).any()]
    figure, axes = panels(len(models), len(metrics), 2.9)
    drawn, shown, choices, doubts = [], [], [], {}
    for ax, ((name, part), metric) in zip(axes, product(models, metrics)):
        if not (part.metric == metric).any():
            ax.set_axis_off()
            continue
        part = check_scores(part)
        choice, doubts[name] = choice_of(part, tables, seen)
        choices.append(choice)
        plots.agreement_matrix(part, metric, choice=choice, ax=ax)
        finish(ax, name)
        shown.append(Reading().rows(part, metric, "vision"))
        drawn.append(in_panel(agreement(part, metric).assign(metric=metric), part, name))
    opening = clauses(
        f"Agreement of every vision position with every text position, {joined(shown)}"
        f"{mean_over(shown, 'seed')}", {"Bars beside the axes: the chosen blocks": any(choices),
                                      **dict.fromkeys(doubted(doubts), True)}
    )  # fmt: skip
    caption = scored(opening, pd.concat(shown), metrics, beside=whole)
    return save(figure, out, "fig3_agreement", drawn, caption)


def fig4_placement_sweep(tables: Folders, out: Path) -> list[Path]:
    """Draw base, novel and HM over the first adapted block; chosen and published are marked."""
    seen = Seen()
    models = [(n, compared_cells(part)) for n, part in by_model(read_validations(tables, seen))]
    figure, axes = panels(len(models), 1, 2.3)
    drawn, doubts = [], {}
    for (name, part), ax in zip(models, axes):
        means, doubts[name] = marked(placement_means(part), *choice_of(part, tables, seen))
        means = sweep(means)
        spans = means[means.on_axis].assign(placement=means.label, chosen=False)
        plots.placement_sweep(spans, ax=ax)
        mark_sweep(ax, means)
        finish(ax, name, pad=20)
        drawn.append(in_panel(means, part, name))
    shared_legend(figure, axes, 3)
    cells = [part for _, part in models]
    opening = clauses(
        "Test accuracy on base and novel classes and their harmonic mean against the first adapted "
        f"block{mean_over(cells, 'dataset', 'seed')}",
        {"Bands: ± one standard deviation over seeds": bool(pd.concat(drawn).hm_sd.notna().any())},
    )
    caption = trained(opening, pd.concat(cells), doubts)
    return save(figure, out, "fig4_placement_sweep", drawn, caption)


def fig5_predicted_vs_trained(tables: Folders, out: Path) -> list[Path]:
    """Draw the quality predicted from the scores against the trained harmonic mean."""
    seen = Seen()
    # By weights as well: names in panels may leave them out.
    scores = dict(iter(read_scores(tables, seen=seen).groupby(SOURCE, sort=False)))
    validations = by_model(read_validations(tables, seen))
    models = [(name, compared_cells(part)) for name, part in validations if _source(part) in scores]
    if not models:
        raise MissingTable("no model has both scores and a validation; record both to draw this")
    figure, axes = panels(len(models), 1, 2.6)
    drawn, doubts = [], {}
    for (name, part), ax in zip(models, axes):
        means, doubts[name] = marked(placement_means(part), *choice_of(part, tables, seen))
        points = predicted_means(check_scores(scores[_source(part)]), means)
        plots.predicted_vs_trained(points.assign(placement=points.short), ax=ax)
        ax.margins(x=0.12, y=0.1)
        score = points.score.iloc[0].replace("_x_", " × ").replace("_", " ")
        ax.set_xlabel(f"Predicted: {score}")
        tau, n = points.tau.iloc[0], len(points)
        ranked = f"Kendall's τ = {tau:.2f} (n = {n})".replace("-", "−")
        if pd.isna(tau):
            ranked = f"no Kendall's τ, as all are equal (n = {n})"
        finish(ax, f"{name}\n{ranked}")
        drawn.append(in_panel(points, part, name))
    shared_legend(figure, axes, 3)
    for ax in axes:
        drop_overlapping_texts(ax)
    cells = [part for _, part in models]
    caption = trained(
        "Quality predicted from the scores against the trained harmonic mean, one point per "
        f"placement{mean_over(cells, 'dataset', 'seed')}",
        pd.concat(cells), doubts)  # fmt: skip
    return save(figure, out, "fig5_predicted_vs_trained", drawn, caption)


def fig6_cost(tables: Folders, out: Path) -> list[Path]:
    """Draw parameters, time and memory over the first adapted block."""
    try:
        models = list(by_model(read("cost", tables, ("model", "placement", "parameters"))))
    except MissingTable:
        models = list(by_model(read_validations(tables)))
    costs = [(name, in_panel(cost_points(part), part, name)) for name, part in models]
    shown = [key for key in COST_PANELS if any(key in part.columns for _, part in costs)]
    figure, axes = panels(len(shown), 1, 1.3)
    for key, ax in zip(shown, axes):
        label, unit = COST_PANELS[key]
        for number, (name, part) in enumerate(costs):
            if key in part.columns:
                ax.plot(part.start, part[key] / unit, marker="o", markersize=3.2,
                        label=label_text(name), **category(number))  # fmt: skip
        ax.set_ylabel(label)
        values = pd.concat([part[key] for _, part in costs if key in part.columns])
        if values.max() > 10 * values.min() > 0:  # as between models
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        else:
            ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
        ax.xaxis.set_major_locator(MaxNLocator(13, integer=True, steps=[1, 2, 4, 5, 10]))
        ax.set_xlabel("First adapted block, up to the last")
        title = costs[0][0] if len(costs) == 1 and key == shown[0] else ""
        finish(ax, title, last=key == shown[-1])
    shared_legend(figure, axes, 2)
    opening = (
        "Cost of adapting every block from the first one named up to the last; "
        "the values of the weights do not change it"
    )
    caption = scored(opening, pd.concat([part for _, part in costs]), [])
    return save(figure, out, "fig6_cost", [part for _, part in costs], caption)


FIGURES = {
    draw.__name__: draw
    for draw in (fig1_dataset_recognition, fig2_gap, fig3_agreement, fig4_placement_sweep,
                 fig5_predicted_vs_trained, fig6_cost)
}  # fmt: skip


def by_model(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the rows of each model under its name and weights, in order of appearance.

    A file of weights is named only where it tells two models of one name apart.
    """
    if "weights" not in table.columns:
        table = table.assign(weights="")
    several = (table.groupby("model")["weights"].nunique() > 1).to_dict()
    for (model, weights), part in table.groupby(SOURCE, sort=False):
        known = weights and (several.get(model) or not str(weights).endswith(".safetensors"))
        yield f"{model} ({weights})" if known else str(model), part.reset_index(drop=True)


def _source(part: pd.DataFrame) -> tuple[str, str]:
    """Return model and weights of the rows of one model."""
    model, weights = part[SOURCE].iloc[0]
    return str(model), str(weights)


def in_panel(points: pd.DataFrame, part: pd.DataFrame, panel: str) -> pd.DataFrame:
    """Return the points of a panel with their model, weights and panel, as they are saved."""
    return with_source(points, *_source(part)).assign(panel=panel)


def seed_spread(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per tower and position: mean over seeds, interval ± one sd over seeds."""
    keys = [name for name in scores.columns if name not in
            ("value", "low", "high", "null", "n", "seed", "drawn", "options")]  # fmt: skip
    # pandas would drop groups with a missing value among their keys.
    groups = measured(scores).groupby(keys, sort=False, dropna=False)
    frame = groups.agg(value=("value", "mean"), sd=("value", "std"), null=("null", "mean"),
                       n=("n", "first"), seeds=("drawn", "nunique")).reset_index()  # fmt: skip
    sd = frame.sd.fillna(0.0)
    noted = {
        (metric, tower): f"ceiling={most:g}"
        for metric, tower in set(zip(frame.metric, frame.tower))
        if (most := ceiling(scores, metric, tower)) < 1
    }
    options = [noted.get(one, "") for one in zip(frame.metric, frame.tower)]
    return frame.assign(low=frame.value - sd, high=frame.value + sd, seed=-1, options=options)


def choice_of(
    scores: pd.DataFrame, tables: Folders, seen: Seen | None = None
) -> tuple[LayerChoice | None, str]:
    """Return the recorded choice for the model of a table, and why there is none of those found.

    A curve over the seeds of several runs has no choice where these chose otherwise, and none that
    was made of other weights of the same name.

    Args:
        scores: Rows of one model.
        tables: Where choices lie.
        seen: How the rows were made, from `read_scores` or `read_validations`.
    """
    model = _source(scores)
    paths = [path for folder in as_folders(tables) for path in sorted(folder.glob("choice*.json"))]
    choices = {
        path: choice
        for path, choice in ((path, LayerChoice.load(path)) for path in paths)
        if (choice.evidence.get("model"), choice.evidence.get("weights")) == model
    }
    _, drawn = (seen or {}).get((*model, "weights_hash"), (None, ""))
    made = {path: _weights_beside(path) for path in choices}
    of_these = [one for path, one in choices.items() if not drawn or made[path] in ("", drawn)]
    if choices and not of_these:
        path = next(iter(choices))
        return None, (
            f"no choice is marked, as {short(path)} is of weights_hash={made[path]} and what is "
            f"drawn of weights_hash={drawn}"
        )
    found = dict.fromkeys(str(Placement(one.vision, one.text)) for one in of_these)
    if len(found) > 1:
        return None, f"no choice is marked, as runs chose {' and '.join(found)}"
    return (of_these[0] if of_these else None), ""


def _weights_beside(choice: Path) -> str:
    """Return a mark of the weights that the run of a choice measured; empty where not recorded."""
    made = provenance_beside(choice, "choice.json")
    return str(made.get("model", {}).get("weights_hash", ""))[:12]


def cost_points(table: pd.DataFrame) -> pd.DataFrame:
    """Return the cost of the spans that end at the last block, by first adapted block."""
    if "kind" in table.columns:
        table = sweep(placement_means(table)).query("kind.str.contains('start')")
        # Placements that trained side by side share one time, which says nothing about each.
        if "seconds" in table.columns and table.seconds.duplicated().any():
            table = table.drop(columns="seconds")
    kept = [name for name in ("placement", "device", *COST_PANELS) if name in table.columns]
    starts = [start_block(name) for name in table.placement]
    return table[kept].assign(start=starts).sort_values("start", ignore_index=True)
