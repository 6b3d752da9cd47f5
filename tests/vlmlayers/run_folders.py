"""Run folders with planted numbers, for the tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from score_tables import DATASETS, full, planted

from vlmlayers.files import write_json
from vlmlayers.runs import Run
from vlmlayers.scores import write_scores
from vlmlayers.selection import predict, select

TINY_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 4, "width": 32,
                       "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2,
                     "layers": 3},
    }
}  # fmt: skip


def tiny_clip(folder: Path) -> Path:
    """Write the configuration of a model of unequal towers, small enough to run untrained."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CLIP))
    return folder


def make_run(
    folder: Path,
    vision: int = 12,
    text: int = 12,
    *,
    validated: bool = False,
    small: bool = False,
    **options: Any,
) -> Run:
    """Write scores, choice, provenance and, if asked, a validation; `small` has two metrics."""
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    depths = (vision, text)
    starts = (vision // 3 + 1, text // 3 + 1)
    scores = planted(*depths, starts).assign(**options) if small else full(*depths, **options)
    refusal = {
        "metric": "h_score", "dataset": DATASETS[2], "tower": "vision", "position": "1",
        "reason": "too few items (3)",
    }  # fmt: skip
    scores.attrs.update(cost={"dataset_accuracy": 1.25}, refused=[refusal])
    write_scores(scores, folder)
    select(scores, resamples=20).save(run.choice)
    towers = {"vision": (vision, 128), "text": (text, 96)}
    run.record(
        model={
            "weights_hash": "abc", "parameters": 8_500_000,
            "random_weights": options.get("weights") == "random",
            "towers": {t: {"blocks": b, "width": w, "kind": "blocks", "layers": ["attn", "mlp.fc"],
                           "modules": [f"{t}.blocks.{i}" for i in range(b)]}
                       for t, (b, w) in towers.items()},
        },
        datasets={DATASETS[2]: {"title": "<img src=x onerror=alert(1)>", "items": 300}},
        environment={"written": "2026-01-01", "commit": "0123abc"}, seed=0,
    )  # fmt: skip
    if validated:
        _validate(run, scores)
    return run


def _validate(run: Run, scores: pd.DataFrame) -> None:
    generator = np.random.default_rng(0)
    placements = {f"v{i}-12,t{i}-12": (range(i, 13), range(i, 13)) for i in range(1, 13)}
    rows = []
    for dataset in ("digits", "shapes"):
        for seed in (1, 2, 3):
            for start, name in enumerate(placements, 1):
                base = 70 - start + generator.normal()
                novel = 50 + start + generator.normal()
                kind = {5: "chosen+paper+start", 1: "start+all"}.get(start, "start")
                rows.append(
                    {"dataset": dataset, "seed": seed, "placement": name, "kind": kind,
                     "parameters": 1000 * (13 - start), "base": base, "novel": novel,
                     "hm": 2 * base * novel / (base + novel)}
                )  # fmt: skip
            lone = {"placement": "v5-12,t-", "kind": "vision", "parameters": 500}
            rows.append({**rows[-1], **lone, "base": 66.0, "novel": 60.0, "hm": 62.9})
    cells = pd.DataFrame(rows)
    cells.to_csv(run.validation, index=False)
    placements["v5-12,t-"] = (range(5, 13), ())
    _compared(cells).to_csv(run.folder / "validation_placements.csv", index=False)
    predicted = predict(scores, placements)
    trained = cells.groupby("placement")["hm"].mean()
    predicted["trained"] = predicted["placement"].map(trained)
    predicted.to_csv(run.folder / "validation_predicted.csv", index=False)
    pd.DataFrame(
        [{"score": s, "tau": 0.5, "low": 0.1, "high": 0.8, "p": 0.01}
         for s in predicted["score"].unique()]
    ).to_csv(run.folder / "validation_correlations.csv", index=False)  # fmt: skip
    write_json(run.folder / "validation.json", {
        "verdict": "The chosen placement did worse than the default.",
        "chosen": "v5-12,t5-12", "reference": "v5-12,t5-12",
        "predictors": "Of 14 scores that read a measurement, none predicted the outcome.",
    })  # fmt: skip


def _compared(cells: pd.DataFrame) -> pd.DataFrame:
    """Means and differences as the trainer writes them; intervals of one point each way."""
    means = cells.groupby("placement", sort=False)[["parameters", "base", "novel", "hm"]].mean()
    means.loc["zero-shot"] = [0, 50, 55, 52.4]
    anchor = means.loc["v5-12,t5-12"]
    for name in ("base", "novel", "hm"):
        other = "difference" if name == "hm" else f"{name}_difference"
        means[other] = means[name] - anchor[name]
        for column in (name, other):
            means[f"{column}_low"], means[f"{column}_high"] = means[column] - 1, means[column] + 1
    return means.reset_index()
