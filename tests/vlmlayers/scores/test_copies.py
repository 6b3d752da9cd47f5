"""Copies of images: a probe is tested on what it was fitted on, and the user is told."""

from __future__ import annotations

import numpy as np
import pytest

from vlmlayers import LayerFeatures, score


def features(name: str, x: np.ndarray, pooling: str = "mean", split: str = "val") -> LayerFeatures:
    labels = np.arange(len(x)) % 3
    return LayerFeatures.from_arrays(
        {1: x[:, ::-1].copy(), 2: x},
        labels=labels,
        class_names=list("abc"),
        dataset=name,
        split=split,
        pooling=pooling,
    )


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)


def test_copies_inside_a_dataset_are_told(x: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    score(features("plain", x), ["fisher_ratio"], progress=False)
    assert not caplog.text
    x[[20, 23]] = x[5]
    score(features("twice", x), ["fisher_ratio"], progress=False)
    assert "twice: 2 of 30 images have exactly the features of another" in caplog.text


def test_images_of_two_datasets_are_told(x: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    other = x + 1
    other[3] = x[7]
    score([features("one", x), features("two", other)], ["dataset_accuracy_ncm"], progress=False)
    assert "one (val) and two (val) share 1 image" in caplog.text
    both = [features("one", x), features("one", other, split="test")]
    score(both, ["fisher_ratio"], progress=False)
    assert "one (val) and one (test) share 1 image" in caplog.text


def test_one_dataset_recorded_twice_holds_no_copies(
    x: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    """As with two poolings, which share the projected features."""
    both = [features("one", x), features("one", x, pooling="cls")]
    score(both, ["fisher_ratio"], progress=False)
    assert "share" not in caplog.text and "copies" not in caplog.text
    x[4] = x[5]
    both = [features(name, x, pooling=how) for name in ("one", "two") for how in ("cls", "mean")]
    score(both, ["fisher_ratio"], progress=False)
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "one", "two", "one (val) and two (val) share 29 images",
    ]  # fmt: skip
