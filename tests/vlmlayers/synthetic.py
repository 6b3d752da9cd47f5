"""Synthetic features with a known story, and inputs that fit any entry of the METRICS table."""

from __future__ import annotations

import numpy as np

from vlmlayers.features import LayerFeatures, TowerFeatures
from vlmlayers.metrics import Metric
from vlmlayers.positions import tower_positions

PLAIN_NEEDS = (
    "labels", "pairs", "features", "modalities", "queries", "prompts", "datasets", "class parts",
    "styles", "style classes", "novel classes", "other datasets",
)  # fmt: skip


def metric_inputs(
    entry: Metric, seed: int = 0, *, n: int = 36, width: int = 9, classes: int = 3
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return feature matrices that belong together, and the labels that follow them."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    means = rng.normal(size=(classes, width))
    x = rng.normal(size=(n, width)) + means[y] + 0.5
    if entry.needs == "labels":
        return [x], [y]
    if entry.needs == "features":
        return [x], []
    if entry.needs == "pairs":
        return [x], [x[:, :6] + rng.normal(size=(n, min(width, 6)))]
    if entry.needs == "prompts":
        return [x, means + rng.normal(size=means.shape)], [y]
    if entry.needs in ("modalities", "queries"):
        return [x, x + rng.normal(size=x.shape) - 1.0], []
    a, b = n // 2, 3 * n // 4
    return [x[:a], x[a:b], x[b:]], [y[:a], y[a:b]]


def metric_value(
    entry: Metric, features: list[np.ndarray], rest: list[np.ndarray], classes: int = 3
) -> np.ndarray:
    """Return what the plain function of an entry gives: a number, or predicted classes."""
    options = dict(entry.settings)
    if entry.needs in ("novel classes", "other datasets"):
        geometry, support, x = features
        return entry.function(geometry, rest[0], support, rest[1], x, classes=classes)
    if len(features) == 3:
        fit, val, x = features
        return entry.function(fit, rest[0], val, rest[1], x, classes=classes, **options)
    if "k" in entry.takes:
        options["k"] = 4
    return np.asarray(entry.function(*features, *rest, **options))


def make_features(
    dataset: str = "alpha",
    *,
    number: int = 0,
    items: int = 60,
    classes: int = 6,
    blocks: int = 3,
    widths: tuple[int, int, int] = (24, 16, 12),
    captions: int = 0,
    names: str = "",
    strength: float = 1.0,
    seed: int = 0,
    offset: float = 0.0,
) -> LayerFeatures:
    """Return features whose dataset and class signal grows linearly with depth."""
    rng = np.random.default_rng([seed, number])
    labels = np.arange(items) % classes
    class_names = tuple(f"{names or dataset} thing {c}" for c in range(classes))
    if captions:
        pairs = np.repeat(np.arange(items), captions)
        text_labels = labels[pairs]
        ids = tuple(f"caption {i}" for i in range(len(pairs)))
    else:
        pairs, text_labels = None, np.arange(classes)
        ids = tuple(f"a photo of a {name}." for name in class_names)

    def arrays(width: int, given: np.ndarray, owner: np.ndarray, shared: int) -> dict:
        by_space: dict[str, dict[str, np.ndarray]] = {}
        for space in ("native", "joint"):
            d = widths[2] if space == "joint" else width
            story = np.random.default_rng([shared, number])
            dataset_mean, class_means = story.normal(size=d), story.normal(size=(classes, d))
            own = story.normal(size=(items, d))
            modality = np.random.default_rng(shared).normal(size=d)
            by_space[space] = {}
            for i, position in enumerate(tower_positions(blocks, space)):
                depth = strength * i / (blocks + 1)
                wide = widths[2] if position == "proj" else d
                x = depth * (dataset_mean + class_means[given] + 0.5 * own[owner])
                x = x + rng.normal(size=x.shape) + modality + offset
                by_space[space][position] = x[:, :wide].astype(np.float32)
        return by_space

    rows = np.arange(items)
    vision = TowerFeatures(
        "vision",
        blocks,
        "cls",
        "images",
        tuple(f"train/{i:06d}" for i in range(items)),
        labels,
        arrays(widths[0], labels, rows, 1),
    )
    text = TowerFeatures(
        "text",
        blocks,
        "eot",
        "captions" if captions else "prompts",
        ids,
        text_labels,
        arrays(widths[1], text_labels, rows[: len(ids)] if pairs is None else pairs, 2),
        pairs,
    )
    return LayerFeatures("toy", "random", dataset, "train", class_names, vision, text, True)


def many(count: int = 3, **options) -> list[LayerFeatures]:
    """Return features of several datasets."""
    return [make_features(f"set{i}", number=i, **options) for i in range(count)]
