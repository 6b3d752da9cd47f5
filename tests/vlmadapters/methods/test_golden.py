"""Recorded runs of the authors' code are followed: extracts anywhere, whole files of shared/."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copy

import golden
import numpy as np
import pytest
from extracts import HERE, KEPT

# What every file holds a check of, under whatever name of its own besides.
EVERYWHERE = {"logits", "gradients", "losses", "final logits"}
VARIANTS = {
    "clipadapter": 1,
    "cliplora": 15,
    "cocoop": 3,
    "coop": 9,
    "ivlp": 4,
    "kgcoop": 5,
    "lasp": 5,
    "lweib": 5,
    "maple": 4,
    "proda": 5,
    "promptsrc": 3,
    "rpo": 4,
    "tip": 2,
}


def replayed(path: Path) -> tuple[set[str], list[object]]:
    """Return the variants, none where a quantity was never checked, and the checks that failed."""
    checks = list(golden.replay(path))
    seen: dict[str, set[str]] = {}
    for check in checks:
        seen.setdefault(check.variant, set()).add(check.quantity)
    whole = set().union(*seen.values()) >= EVERYWHERE
    return (set(seen) if whole else set()), [check for check in checks if not check.passed]


@pytest.mark.parametrize("name", KEPT)
def test_an_extract_is_followed(name: str) -> None:
    variants, failed = replayed(HERE / f"{name}.npz")
    assert len(variants) == (2 if name == "tip" else max(1, len(KEPT[name])))
    assert failed == []


@pytest.mark.parametrize("name", VARIANTS)
def test_a_whole_record_is_followed(shared_golden: Path, name: str) -> None:
    variants, failed = replayed(shared_golden / "methods" / f"{name}_tiny.npz")
    assert len(variants) == VARIANTS[name]
    assert failed == []


def altered_copy(folder: Path, name: str, changes: dict[str, np.ndarray]) -> str:
    """Copy an extract with other values of some arrays; return where its arrays lie."""
    np.savez(folder / f"{name}.npz", **{**np.load(HERE / f"{name}.npz"), **changes})
    for path in (HERE / f"{name}.json", HERE / "text_tower.npz"):
        copy(path, folder)
    return str(folder / f"{name}.npz")


@pytest.mark.parametrize("key", ["random_end/losses", "random_end/grad/ctx", "random_end/lrs"])
def test_what_differs_from_a_record_is_told(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(np.load(HERE / "coop.npz"))
    assert golden.main([altered_copy(tmp_path, "coop", {key: arrays[key] * 1.001})]) == 1
    told = capsys.readouterr().out.splitlines()
    failed = [line for line in told if line.startswith("FAIL")]
    assert {line.split()[2] for line in failed} == {"random_end"}
    assert told[-1] == f"{len(failed)} outside their tolerance"


def test_no_number_among_numbers_is_told(tmp_path: Path) -> None:
    """Of the last of several gradients, which Python's `max` would pass over."""
    key = "words_batch4/grad/meta_net.linear2.bias"
    path = altered_copy(tmp_path, "cocoop", {key: np.load(HERE / "cocoop.npz")[key] * np.nan})
    assert golden.main([path]) == 1


def test_a_record_without_a_run_is_told(tmp_path: Path) -> None:
    path = Path(altered_copy(tmp_path, "coop", {})).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variants": {}}))
    with pytest.raises(SystemExit, match="coop.npz: no run is recorded in it"):
        golden.main([str(path.with_suffix(".npz"))])
