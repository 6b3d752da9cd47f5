"""Score tables with a known answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from vlmlayers.positions import relative_depth

COLUMNS = [
    "model",
    "weights",
    "dataset",
    "split",
    "tower",
    "position",
    "depth",
    "space",
    "pooling",
    "metric",
    "value",
    "low",
    "high",
    "null",
    "n",
    "seed",
    "other_tower",
    "other_position",
    "options",
]
DATASETS = ("digits", "shapes", "<b>signs</b>")


def row(
    metric: str,
    tower: str,
    position: str,
    blocks: int,
    value: float,
    *,
    half: float = 0.0,
    **others: object,
) -> dict[str, object]:
    base = {
        "model": "toy",
        "weights": "toy.safetensors",
        "dataset": "*",
        "split": "train",
        "space": "native",
        "pooling": "cls" if tower == "vision" else "eot",
        "null": 0.1,
        "n": 300,
        "seed": -1,
        "other_tower": "",
        "other_position": "",
        "options": "",
    }
    return (
        base
        | {
            "tower": tower,
            "position": position,
            "metric": metric,
            "value": value,
            "depth": relative_depth(position, blocks),
            "low": value - half,
            "high": value + half,
        }
        | others
    )


def curve_rows(
    metric: str,
    tower: str,
    values: Sequence[float],
    *,
    half: float = 0.0,
    seeds: Sequence[int] = (-1,),
    jitter: float = 0.0,
    ends: bool = True,
    **others: object,
) -> list[dict[str, object]]:
    """Rows of one curve: `embed` and `proj` repeat the first and last block where `ends`."""
    depth = len(values)
    generator = np.random.default_rng(7)
    named = {str(b + 1): v for b, v in enumerate(values)}
    if ends:
        named = {"embed": values[0], **named, "proj": values[-1]}
    return [
        row(
            metric,
            tower,
            position,
            depth,
            value + jitter * generator.standard_normal(),
            half=half,
            seed=seed,
            **others,
        )
        for seed in seeds
        for position, value in named.items()
    ]


def pair_rows(
    metric: str, vision: int, text: int, cell: Callable[[int, int], float], **others: object
) -> list[dict[str, object]]:
    """Rows of a vision × text matrix; `cell` takes block numbers."""
    return [
        row(
            metric,
            "vision",
            str(i),
            vision,
            cell(i, j),
            other_tower="text",
            other_position=str(j),
            **others,
        )
        for i in range(1, vision + 1)
        for j in range(1, text + 1)
    ]


def table(*parts: list[dict[str, object]]) -> pd.DataFrame:
    return pd.DataFrame([one for part in parts for one in part], columns=COLUMNS)


def step(depth: int, start: int, low: float = 0.4, high: float = 0.9) -> list[float]:
    """A curve that jumps from low to high at block `start`."""
    return [low if b < start else high for b in range(1, depth + 1)]


def planted(
    vision: int = 12,
    text: int = 12,
    start: tuple[int, int] = (5, 5),
    *,
    half: float = 0.01,
    seeds: Sequence[int] = (0, 1, 2),
) -> pd.DataFrame:
    """A table whose curves jump at known blocks and whose towers agree from there on."""

    def agreement(i: int, j: int) -> float:
        return 0.8 if i >= start[0] and j >= start[1] else 0.2

    return table(
        curve_rows("dataset_accuracy", "vision", step(vision, start[0]), half=half, seeds=seeds),
        curve_rows("dataset_accuracy", "text", step(text, start[1]), half=half, seeds=seeds),
        pair_rows("cka_debiased", vision, text, agreement),
    )


def full(vision: int = 12, text: int = 12, **options: object) -> pd.DataFrame:
    """A planted table with the metrics that a report shows, on three datasets."""
    parts = [planted(vision, text).to_dict("records")]
    for number, dataset in enumerate(DATASETS):
        for tower, depth in (("vision", vision), ("text", text)):
            rise = [0.3 + 0.04 * number + 0.5 * (b + 1) / depth for b in range(depth)]
            parts.append(curve_rows("class_accuracy", tower, rise, half=0.03, dataset=dataset))
            parts.append(
                curve_rows(
                    "fisher_ratio",
                    tower,
                    [v * 2 for v in rise],
                    half=0.1,
                    dataset=dataset,
                    null=0.03,
                )
            )
        falling = [1.2 - 0.4 * (b + 1) / vision + 0.05 * number for b in range(vision)]
        gap = curve_rows(
            "centroid_gap",
            "vision",
            falling,
            half=0.02,
            dataset=dataset,
            space="joint",
            null=0.08,
            other_tower="text",
        )
        for one in gap:
            position = str(one["position"])
            if position.isdecimal():
                position = str(max(1, int(int(position) * text / vision + 0.5)))
            one["other_position"] = position
        parts.append(gap)
        zero_shot = curve_rows(
            "zero_shot_accuracy",
            "vision",
            [0.1 + 0.04 * b for b in range(vision)],
            half=0.03,
            dataset=dataset,
            space="joint",
            other_tower="text",
        )
        parts.append([{**one, "other_position": "proj"} for one in zero_shot])
        parts.append(
            pair_rows(
                "cka_debiased", vision, text, lambda i, j: 0.1 + 0.02 * (i + j), dataset=dataset
            )
        )
    return table(*parts).assign(**options)
