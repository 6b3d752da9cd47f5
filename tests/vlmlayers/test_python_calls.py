"""Calls as people type them: taken as they are meant, or refused in one line that says what is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.vlmlayers import score_tables, tiny
from tests.vlmlayers.synthetic import many

import vlmlayers as vl
from vlmlayers.errors import UserError
from vlmlayers.features import open_features
from vlmlayers.models import load_model, wrap_model

FEW: dict[str, Any] = {"metrics": "dataset_accuracy_ncm", "bootstrap": 20, "progress": False}
FACES = vl.Manifest.load("faces")


def extract(data: Any = FACES, split: Any = "val", **options: Any) -> vl.LayerFeatures:
    return vl.extract(tiny.model(), data, split, progress=False, **{"items": 6} | options)


def arrays(labels: Any = None, **options: Any) -> vl.LayerFeatures:
    return vl.LayerFeatures.from_arrays({"1": np.ones((4, 3))}, labels=labels, **options)


def wrapped(**changed: Any) -> Any:
    given = {
        "clip": tiny.build("clip"),
        "preprocess": tiny.preprocess,
        "tokenizer": tiny.tokenizer,
        "name": "own",
        "weights": "own",
    }
    return wrap_model(**given | changed)


def score(features: Any = None, **options: Any) -> pd.DataFrame:
    return vl.score(many(2) if features is None else features, **FEW | options)


@pytest.mark.parametrize(
    ("call", "taken"),
    [
        (lambda: len(extract("faces").vision.ids), 6),
        (lambda: len(extract(items=np.int64(7), batch_size=np.int32(4)).vision.ids), 7),
        (lambda: len(extract(items=iter(FACES.items("val")[:5])).vision.ids), 5),
        (lambda: len(extract(items=10**9).vision.ids), len(FACES.items("val"))),
        (lambda: set(score(positions="2")["position"]), {"2"}),
        (lambda: set(score(positions=[1, np.int32(2)])["position"]), {"1", "2"}),
        (
            lambda: set(score(iter(many(2)), metrics=iter(["effective_rank"]))["metric"]),
            {"effective_rank"},
        ),
        (lambda: len(score(seeds=range(2))), 2 * len(score(seeds=np.int64(3)))),
        (lambda: arrays(pd.Series([0, 1, 0, 1], index=[9, 8, 7, 6])).vision.labels.tolist(), None),
        (lambda: arrays(torch.tensor([0, 1, 0, 1])).vision.labels.tolist(), None),
        (lambda: len(arrays([0, 1, 0, 1], text={1: np.ones((3, 3))}).class_names), 3),
        (lambda: arrays([0.0, 1.0, 0.0, 1.0]).vision.labels.tolist(), None),
    ],
)
def test_natural_calls_are_taken_as_meant(call: Callable[[], Any], taken: Any) -> None:
    assert call() == ([0, 1, 0, 1] if taken is None else taken)


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [3, 4.0]],
        torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16),
        pd.DataFrame({"b": [1, 3], "a": [2, 4]}, index=[1, 0]),
        np.array([[1, 2], [3, 4]], dtype=np.int16, order="F"),
    ],
)
def test_features_of_every_usual_type_are_read_in_their_order(values: Any) -> None:
    features = vl.LayerFeatures.from_arrays({1: values})
    assert features.vision.array("1").tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("captions", [0, 2])
def test_a_mask_takes_the_items_that_it_marks(captions: int) -> None:
    """Its values are no row numbers, which False and True would be as well."""
    features = next(iter(many(1, captions=captions)))
    marked = features.vision.labels == 1
    rows = np.flatnonzero(marked)
    assert 0 < len(rows) < len(marked)
    for mask in (marked, pd.Series(marked), marked.tolist()):
        found = features.take_images(mask)
        assert found.vision.ids == tuple(features.vision.ids[row] for row in rows)
        assert (found.vision.labels == 1).all()
        expected = features.take_images(rows)
        assert found.text.ids == expected.text.ids
        for tower in found:
            for position in found[tower].positions():
                assert np.array_equal(found[tower][position], expected[tower][position])
    assert features.vision.take([-1, 0]).ids == (features.vision.ids[-1], features.vision.ids[0])


def test_captions_follow_their_images_in_any_order_and_as_often_as_these_are_taken() -> None:
    """Of an image that was taken twice, as in a resample, the first copy had no caption left."""
    values = np.arange(5.0)[:, None]
    features = vl.LayerFeatures.from_arrays(
        {1: values[:4]}, {1: values}, labels=[2, 0, 1, 3], pairs=[0, 3, 2, 2, 0]
    )
    assert features.text.labels.tolist() == [2, 3, 1, 1, 2]
    for rows in ([2, 1, 0], [0, -1, 0], [1]):
        found = features.take_images(rows)
        assert found.vision[1][:, 0].tolist() == [row % 4 for row in rows]
        pairs = zip(found.text[1][:, 0].tolist(), found.text.pairs.tolist())
        expected = [(text, place) for text, image in enumerate([0, 3, 2, 2, 0])
                    for place, row in enumerate(rows) if row % 4 == image]  # fmt: skip
        assert list(pairs) == expected
        assert (found.text.labels == found.vision.labels[found.text.pairs]).all()


def test_features_are_walked_by_the_names_that_brackets_take() -> None:
    features = arrays()
    assert list(features) == ["vision"] and "vision" in features and "text" not in features
    with pytest.raises(TypeError, match="not iterable"):
        list(features.vision)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: extract(split="validation"), "unknown split 'validation'; valid: train, val"),
        (lambda: extract(items=0), "items takes a whole number from 1 or items of the dataset or"),
        (lambda: extract(items=6.0), "items takes a whole number from 1"),
        (lambda: extract(batch_size=0), "batch_size is 0; at least 1"),
        (lambda: extract(workers=-1), "workers is -1; at least 0"),
        (lambda: extract(batch_size="8"), "batch_size is '8'; a whole number is needed"),
        (lambda: extract(batch_size=8.0), "batch_size is 8.0; a whole number is needed"),
        (lambda: extract(skip_unreadable="yes"), "skip_unreadable is 'yes'; true or false"),
        (lambda: extract(skip_unreadable=1), "skip_unreadable is 1; true or false is needed"),
        (lambda: extract("no/such/folder"), "no/such/folder"),
        (lambda: arrays().vision[1, :, 0], "rows and columns are those of the array"),
        (lambda: arrays().vision.take([4]), "there is no row 4; valid: 0 to 3"),
        (lambda: arrays().take_images([-5]), "there is no row -5; valid: 0 to 3"),
        (lambda: arrays().take_images([0.5]), "0.5 at item 0; expected whole numbers"),
        (lambda: arrays().take_images([True]), "a mask of shape (1,) is not of 4 items"),
        (lambda: arrays().vision.take(np.ones((4, 2), bool)), "a mask of shape (4, 2) is not of"),
        (lambda: arrays().take_images(slice(2)), "rows takes row numbers in order, or a mask, not"),  # type: ignore[arg-type]
        (lambda: arrays().vision.take(3), "rows takes row numbers in order, or a mask, not 3"),
        (lambda: arrays().save(None), "path takes a string or a path, not None"),  # type: ignore[arg-type]
        (lambda: arrays(labels={3, 2, 1, 0}), "labels takes a sequence in order or None, not a"),
        (
            lambda: vl.LayerFeatures.from_arrays(np.ones((2, 4, 3))),  # type: ignore[arg-type]
            "vision takes a mapping from positions to arrays or None, not a value",
        ),
        (lambda: score(positions=[]), "positions is []; a list of at least 1 is needed"),
        (lambda: score(many(1)[0].vision), "features takes LayerFeatures, not a value"),
        (lambda: extract(pooling="cls,mean"), "pooling"),
        (lambda: score(positions="12"), "unknown position '12'"),
        (lambda: vl.extract(tiny.build("clip"), FACES, "val"), "as `load_model` or `wrap_model`"),  # type: ignore[arg-type]
        (lambda: score("runs/x"), "features takes LayerFeatures, not 'runs/x'"),
        (lambda: score(np.zeros((5, 5))), "features takes LayerFeatures"),
        (lambda: score(many(1) * 2), "appears twice among the features"),
        (lambda: score(bootstrap=0), "bootstrap is 0; at least 2"),
        (lambda: score(k=0), "k is 0; at least 1"),
        (lambda: score(k=True), "k is True; a whole number is needed"),
        (lambda: score(metrics="dataset_accuracy_nmc"), "did you mean 'dataset_accuracy_ncm'"),
        (lambda: score(positions="99"), "99"),
        (lambda: score(seeds="one"), "seeds"),
        (lambda: vl.select(score_tables.full(), rule="treshold"), "did you mean 'threshold'"),
        (lambda: vl.select([score_tables.full()]), "a score table, as `score` makes"),  # type: ignore[arg-type]
        (lambda: vl.select("scores.csv"), "a score table, as `score` makes"),  # type: ignore[arg-type]
        (lambda: vl.select(score_tables.full(), metric="acc"), "unknown metric 'acc'"),
        (lambda: vl.Placement("12-5"), "list of whole numbers"),  # type: ignore[arg-type]
        (lambda: vl.Placement.parse("12-5"), "reversed"),
        (lambda: load_model(None), "a model's name, folder, or a model itself, not None"),  # type: ignore[arg-type]
        (lambda: load_model("ViT-B-61"), "did you mean"),
        (lambda: load_model("mini-clip", precision="fp61"), "fp16"),  # type: ignore[arg-type]
        (lambda: wrapped(preprocess=None), "give preprocess="),
        (lambda: wrapped(clip=torch.nn.Linear(2, 2)), "a Linear has no encode_image"),
        (lambda: wrapped(clip=torch.nn.Linear(2, 2)), "another model: vlmlayers.LayerFeatures.fro"),
        (lambda: load_model(tiny.build("clip"), random_weights=True), "as it is; see wrap_model"),
        (lambda: open_features("no/such/store"), "no/such/store"),
        (lambda: arrays([-1, 0, 1, 1]), "-1 at item 0"),
        (lambda: arrays([0.5, 1, 0, 1]), "0.5 at item 0"),
        (lambda: arrays([0, np.nan, 1, 1]), "nan at item 1"),
        (lambda: arrays(["a", "b", "a", "b"]), "return_inverse"),
        (lambda: arrays([0, 1]), "4 ids but 2 labels"),
        (lambda: arrays([0, 1, 2, 3], class_names=["a", "b"]), "2 at item 2"),
        (lambda: vl.LayerFeatures.from_arrays({"1": np.ones((4, 7, 3))}), "shape"),
        (lambda: vl.LayerFeatures.from_arrays({"1": np.full((4, 3), 1e39)}), "largest of float32"),
        (lambda: vl.LayerFeatures.from_arrays({"1": np.full((4, 3), 1e-99)}), "least of float32"),
        (lambda: vl.LayerFeatures.from_arrays({"1": np.ones((0, 3))}), "shape"),
        (lambda: vl.LayerFeatures.from_arrays({"0": np.ones((4, 3))}), "blocks"),
        (lambda: vl.Manifest.load("facse"), "did you mean 'faces'"),
        (lambda: FACES.open_image("val/000000"), "item takes Item, not 'val/000000'"),  # type: ignore[arg-type]
        (
            lambda: vl.predict(score_tables.full(), ["v5-12"]),  # type: ignore[arg-type]
            "placements takes a mapping from names to placements, not a value",
        ),
        (lambda: FACES.items("tset"), "unknown split 'tset'"),
    ],
)
def test_what_cannot_be_meant_is_one_line(call: Callable[[], Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        call()
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_notebook_completes_what_stands_in_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = interactive.InteractiveShell()
    extract(split="val", out=tmp_path / "features" / "faces-val")
    shell.user_ns["features"] = extract()
    shell.user_ns["stores"] = vl.open_run(tmp_path).features
    for typed, offered in (
        ("features['", {"vision", "text"}),
        ("features.vision['", {"embed", "1", "proj"}),
        ("stores['", {"faces-val"}),
    ):
        found = {one.removeprefix(typed).rstrip("']") for one in shell.complete(typed)[1]}
        assert offered <= found, typed


def test_a_notebook_shows_the_callers_lines_and_the_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = interactive.InteractiveShell()
    shell.run_cell("import vlmlayers as vl\ndef mine(name):\n    return vl.Manifest.load(name)")
    shell.run_cell("count = 1\nmine('facse')")
    shown = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in shown[1::2]] == [
        "mine('facse')",
        "return vl.Manifest.load(name)",
    ]
    assert len(shown) == 5 and shown[4].startswith("UserError: unknown dataset 'facse'; did you")
    shell.user_ns["model"] = tiny.model()
    shell.run_cell("vl.extract(model, 'facse')")  # whose decorator is of contextlib
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[2].startswith("UserError: unknown dataset 'facse'")
    shell.run_cell("vl.Manifest.load('faces').items(1 / 0)")
    assert "ZeroDivisionError" in capsys.readouterr().out
