"""The training benchmark compares like with like; its timings are no business of a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from backbones import config


def test_all_sides_of_the_training_benchmark_take_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import training

    small = config({"layers": 12, "width": 32, "head_width": 16}, {"layers": 12})
    monkeypatch.setattr(training, "CLASSES", training.CLASSES[:6])
    rows = training.compare(small, 9, "fp32", "cpu", rounds=2)
    assert [(row["side"], row["views"]) for row in rows] == [
        ("public recipe", "fresh"),
        ("ours", "fresh"),
        ("ours", "cached"),
        ("ours, torch's products", "fresh"),
        ("ours, torch's products", "cached"),
    ]
    assert all(float(row["largest_loss_difference"]) < 1e-4 for row in rows)
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1


@pytest.mark.parametrize(
    "name",
    [
        "coop",
        "cocoop",
        "kgcoop",
        "proda",
        "maple",
        "ivlp",
        "promptsrc",
        "rpo",
        "lasp",
        "clipadapter",
    ],
)
def test_both_sides_of_the_benchmark_of_methods_take_the_same_steps(
    name: str, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import methods
    import public_methods

    small = config(
        {"layers": 3, "width": 32, "head_width": 16}, {"layers": 3, "context_length": 77}
    )
    assert set(public_methods.PUBLIC) == {
        "coop", "cocoop", "kgcoop", "proda", "maple", "ivlp", "promptsrc", "rpo", "lasp",
        "clipadapter",
    }  # fmt: skip
    monkeypatch.setattr(methods, "CLASSES", methods.CLASSES[:4])
    rows = methods.compare(name, small, "cpu", rounds=2)
    assert [(row["side"], row["views"]) for row in rows] == [
        ("public recipe", "fresh"), ("ours", "fresh"), ("ours", "cached"),
    ]  # fmt: skip
    assert all(float(row["largest_loss_difference"]) < 1e-4 for row in rows)
