"""Two processes on one run folder: one is told to wait, and it ends as one alone leaves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from starts import done, finish, images, model_folder, start

from vlmlayers.files import take_lock
from vlmlayers.runs import LOCK

pytestmark = pytest.mark.slow
FAST = 'metrics = ["dataset_accuracy", "cka_debiased"]\noptions = { bootstrap = 20 }\n'


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("two")
    model_folder(place / "model")
    images(place / "colours")
    file = place / "study.toml"
    file.write_text(
        f'models = [{{ path = "{place}/model", random_weights = true }}]\n'
        f'datasets = ["{place}/colours", "digits"]\n'
        f'[extract]\nsplit = "train"\nitems = 200\n[score]\n{FAST}[select]\nrule = "all"\n'
    )
    return file


def words(study: Path, out: Path, *more: object) -> list[object]:
    return ["study", study, "--out", out, "--quiet", "--skip", "validate", *more]


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("scores.csv", "choice.json")}


def test_the_second_is_refused_while_the_first_works(study: Path) -> None:
    out = study.parent / "run"
    partial = out / "features" / "colours-train.partial"
    partial.mkdir(parents=True)
    with take_lock(partial / "lock", partial):  # as the process does that writes the store
        code, said = finish(start(*words(study, out)))
        assert code == 2
        assert f"another process is writing {partial.parent / 'colours-train'}" in said
        assert "Traceback" not in said
    done(*words(study, out))
    alone = study.parent / "alone"
    shutil.copytree(out / "features", alone / "features")
    done(*words(study, alone))
    assert tables(out) == tables(alone)

    again = words(study, out, "--from", "score", "--force")
    with take_lock(out / LOCK, out):  # as another study does from its beginning to its end
        code, said = finish(start(*again))
        assert code == 2
        assert f"another process is writing {out}" in said and "Traceback" not in said
    pair = [finish(process) for process in [start(*again), start(*again)]]
    assert 0 in {code for code, _ in pair} <= {0, 2}, pair
    assert tables(out) == tables(alone)
    assert json.loads((out / "stages.json").read_text())["report"]["inputs"]
    assert not [p for p in out.rglob("*") if p.suffix in (".part", ".tmp")]
