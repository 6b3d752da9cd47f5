"""Metrics that run the model again: on the model and the images that the run was extracted from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from run_folders import tiny_clip
from score_tables import planted

import vlmlayers as vl
from vlmlayers.errors import UserError
from vlmlayers.features.store import open_features
from vlmlayers.report.next_steps import next_steps
from vlmlayers.report.numbers import read_answer
from vlmlayers.runs import Run
from vlmlayers.scores import read_scores, refusals
from vlmlayers.scores.sources import other_features
from vlmlayers.study import check_study, run_study
from vlmlayers.study.verbs import score_run, select_run

QUICK = {"seeds": [1], "bootstrap": 20}
MODEL = ["skip_joint_change"]


def write_images(folder: Path, red: int = 0) -> Path:
    """Write two classes of three images."""
    for number in range(6):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (red, 40 * number, 0)).save(file)
    return folder


def extracted(folder: Path, data: str = "digits", base: str = "", **model: object) -> Run:
    """Extract features of a tiny model, untrained where no weights are named, into `base`/run."""
    clip = folder / "tiny-clip"
    part = {"path": str(clip if clip.exists() else tiny_clip(clip))}
    part |= model or {"random_weights": True}
    study = check_study(
        {"models": [part], "datasets": [data], "extract": {"items": 6, "device": "cpu"}}
    )
    out = Path(base, "run") if base else folder / "run"
    return run_study(study, out, base=base or ".", only=["extract"], progress=False)[0]


def test_weights_that_were_overwritten_since_are_not_scored_beside_the_earlier(
    tmp_path: Path,
) -> None:
    folder, file = tiny_clip(tmp_path / "tiny-clip"), tmp_path / "e.pt"
    weights = vl.load_model(str(folder), random_weights=True).clip.state_dict()
    torch.save(weights, file)
    run = extracted(tmp_path, pretrained=str(file))
    torch.save({key: 1.5 * value for key, value in weights.items()}, file)
    with pytest.raises(UserError, match="another model .*: weights_hash is .*extract again with"):
        score_run(run.folder, ["effective_rank", *MODEL], QUICK, progress=False)
    assert not run.scores.exists()
    torch.save(weights, file)
    notes = run.read_provenance()["model"]
    run.record(model=notes | {"structure": notes["structure"] | {"visual eps": ["2"]}})
    with pytest.raises(UserError, match=r"structure.visual eps is \['2'\] there, \['1e-05'\] here"):
        score_run(run.folder, MODEL, QUICK, progress=False)
    # Another version of a library names more: no other model.
    run.record(model=notes | {"structure": notes["structure"] | {"visual heads": ["2"]}})
    score_run(run.folder, MODEL, QUICK, progress=False)
    run.scores.unlink()
    # As an earlier version recorded it.
    run.record(model={key: value for key, value in notes.items() if key != "structure"})
    score_run(run.folder, MODEL, QUICK, progress=False)
    assert run.scores.exists()


def test_another_seed_examines_other_images_of_those_that_were_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmlayers.study.scoring.EXAMINED", 8)
    tiny_clip(tmp_path / "tiny-clip")

    def scores(seed: int, out: str, metrics: list[str]) -> list[str]:
        content = {
            "models": [{"path": str(tmp_path / "tiny-clip"), "random_weights": True}],
            "datasets": [{"name": "digits", "split": "val"}], "seed": seed,
            "extract": {"items": 0, "device": "cpu", "batch_size": 256},
            "score": {"metrics": metrics, "options": QUICK},
        }  # fmt: skip
        said: list[str] = []
        stages = ["extract", "score"]
        run_study(
            check_study(content), tmp_path / out, only=stages, progress=False, echo=said.append
        )
        return [line for line in said if line.endswith("unchanged")]

    assert scores(1, "run", MODEL) == []
    assert scores(1, "run", MODEL) == ["extract  unchanged", "score    unchanged"]
    first = read_scores(tmp_path / "run")
    assert scores(2, "run", MODEL) == ["extract  unchanged"]
    again = read_scores(tmp_path / "run")
    assert scores(2, "other", MODEL) == []
    assert again["value"].tolist() == read_scores(tmp_path / "other")["value"].tolist()
    assert again["value"].tolist() != first["value"].tolist()
    # All items were drawn, and metrics of features have seeds of their own.
    assert scores(1, "plain", ["effective_rank"]) == []
    assert scores(2, "plain", ["effective_rank"]) == ["extract  unchanged", "score    unchanged"]


def test_metrics_of_the_model_are_those_of_its_own_prompts_seed_and_draws(tmp_path: Path) -> None:
    """With the template, split and items that the run was extracted with."""
    folder, template = tiny_clip(tmp_path / "tiny-clip"), "a blurred {} indeed"
    study = check_study({
        "models": [{"path": str(folder), "random_weights": True}],
        "datasets": [{"name": "digits", "split": "test"}], "seed": 5,
        "extract": {"items": 20, "device": "cpu", "template": template},
    })  # fmt: skip
    run = run_study(study, tmp_path / "run", only=["extract"], progress=False)[0]
    metrics = ["skip_joint_change", "gradient_alignment"]
    score_run(run.folder, metrics, {"seeds": [3, 4], "bootstrap": 30}, progress=False)
    digits = vl.Manifest.load("digits")
    expected = vl.models.examine(
        vl.load_model(str(folder), random_weights=True, device="auto"), digits, "test", metrics,
        items=digits.sample("test", 20, seed=5), template=template, seed=3, bootstrap=30,
        progress=False,
    )  # fmt: skip
    keys = ["metric", "tower", "position", "split", "seed", "n"]
    numbers = ["value", "low", "high", "null"]
    found = [
        table.set_index(keys)[numbers].sort_index() for table in (read_scores(run.folder), expected)
    ]
    pd.testing.assert_frame_equal(*found, check_exact=False, rtol=1e-6)


@pytest.mark.parametrize("metrics", [MODEL, ["effective_rank", *MODEL]])
def test_scores_that_hold_metrics_of_the_model_are_known_by_their_features(
    metrics: list[str], tmp_path: Path
) -> None:
    """So that those of an earlier extraction, or of weights that were overwritten, are told."""
    run = extracted(tmp_path)
    plain = vl.score(open_features(run.features / "digits-train"), ["effective_rank"], **QUICK)
    score_run(run.folder, metrics, QUICK, progress=False)
    found = read_scores(run.folder).attrs
    for name in ("features", "weights_hash"):
        assert found[name] == plain.attrs[name]
    assert set(found.get("cost", {})) == set(metrics) - set(MODEL)
    assert not other_features(run, found)
    study = {"models": [{"path": str(tmp_path / "tiny-clip"), "random_weights": True}],
             "datasets": ["digits"], "extract": {"items": 8, "device": "cpu"}}  # fmt: skip
    run_study(check_study(study), run.folder, only=["extract"], force=True, progress=False)
    assert other_features(run, read_scores(run.folder).attrs) == "digits (train)"


def test_two_splits_of_one_dataset_are_scored(tmp_path: Path) -> None:
    """What the run recorded of them had one name: that of the later one stood for both."""
    study = check_study({
        "models": [{"path": str(tiny_clip(tmp_path / "tiny-clip")), "random_weights": True}],
        "datasets": [{"name": "flags", "split": split} for split in ("train", "val")],
        "extract": {"items": 6, "device": "cpu"},
        "score": {"metrics": MODEL, "options": QUICK},
    })  # fmt: skip
    run = run_study(study, tmp_path / "run", only=["extract", "score"], progress=False)[0]
    assert set(read_scores(run.scores)["split"]) == {"train", "val"}
    run.scores.unlink()
    score_run(run.folder, MODEL, QUICK, progress=False)
    assert set(read_scores(run.scores)["split"]) == {"train", "val"}
    assert {key: one["split"] for key, one in run.read_provenance()["datasets"].items()} == {
        "flags-train": "train", "flags-val": "val",
    }  # fmt: skip


def test_images_of_another_folder_of_the_same_name_are_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, red in (("one", 0), ("other", 255)):
        write_images(tmp_path / name / "pics", red)
    monkeypatch.chdir(tmp_path / "one")
    run = extracted(tmp_path, "pics")
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(UserError, match=r"images of pics .*other/pics: 4 .* 4 altered.*--force"):
        score_run(run.folder, MODEL, QUICK, progress=False)
    assert not run.scores.exists()


def test_images_that_are_gone_are_named_with_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To extract again, as for altered ones, would not bring them back."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("pics"))
    rows = [f"{'ab'[one % 2]}/{one}.png,{'ab'[one % 2]},train" for one in range(6)]
    Path("pics/items.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    run = extracted(tmp_path, "pics/items.csv")
    Path("pics/a/2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 6 images are not in .*pics: a/2\.png;"):
        score_run(run.folder, ["effective_rank", *MODEL], QUICK, progress=False)
    assert not run.scores.exists()


def test_the_next_command_names_the_folder_of_an_earlier_extraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for red, data in enumerate(("my data/pics", "my data/scans")):
        write_images(Path(data), 40 * red)
        run = extracted(tmp_path, data)
    score_run(run.folder, ["effective_rank"], QUICK, progress=False)
    vl.LayerChoice((1,), (1,), "paper").save(run.choice)
    command = next_steps(read_answer(run.folder))[0].code
    assert "'my data/pics'" in command and "'my data/scans'" in command
    extracted(tmp_path, "my data/scans")  # found as it was
    assert next_steps(read_answer(run.folder))[0].code == command


def test_a_run_and_its_images_may_be_moved_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a path as the study names it, from its own folder; what is recorded names no other."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("one/pics"))
    record = extracted(tmp_path, "pics", "one").read_provenance
    assert record()["given"]["from_run"] == {"one/pics": "../pics"}
    Path("one").rename("two")
    monkeypatch.chdir("/")
    score_run(tmp_path / "two/run", MODEL, QUICK, progress=False)
    monkeypatch.chdir(tmp_path)
    written = Path("two/run/features/pics-train/store.json").stat().st_mtime_ns
    given = extracted(tmp_path, "pics", "two").read_provenance()["given"]
    assert given["datasets"] == ["two/pics"] and given["from_run"] == {"two/pics": "../pics"}
    assert Path("two/run/features/pics-train/store.json").stat().st_mtime_ns == written
    Path("two/pics").rename("lost")
    with pytest.raises(UserError) as caught:
        score_run("two/run", MODEL, QUICK, progress=False)
    assert f"from two/pics, which does not exist; tried {tmp_path}/two/pics; put" in str(
        caught.value
    )


def test_what_is_recorded_of_a_run_elsewhere_names_no_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Run(tmp_path / "elsewhere/run").path_to("pics") == ""
    assert Run(Path("run")).path_to(str(tmp_path)) == ""
    assert Run(Path("runs/a")).path_to("../pics") == "../../../pics"


def test_what_can_be_scored_is_kept_beside_what_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("pics"))
    run = extracted(tmp_path, "pics")
    lost = "class_accuracy_ncm"  # two classes of two images
    with pytest.warns(UserWarning, match=f"^not computed: {lost} \\(0 classes with"):
        score_run(run.folder, [*MODEL, lost], QUICK, progress=False)
    table = read_scores(run.folder)
    assert set(table["metric"]) == set(MODEL) and lost in set(refusals(table)["metric"])
    # The other way round: of two classes no half has two.
    score_run(run.folder, ["effective_rank", "gradient_alignment"], QUICK, progress=False)
    table = read_scores(run.folder)
    assert set(table["metric"]) == {"effective_rank"}
    assert "gradient_alignment" in set(refusals(table)["metric"])
    with pytest.raises(UserError, match=f"^nothing was scored: {lost} .*; .*needs 4 classes"):
        score_run(run.folder, [lost, "gradient_alignment"], QUICK, progress=False)
    assert set(read_scores(run.folder)["metric"]) == {"effective_rank"}


def test_a_choice_beside_a_bare_table_leaves_nothing_else(tmp_path: Path) -> None:
    planted().to_csv(tmp_path / "scores.csv", index=False)
    select_run(tmp_path / "scores.csv", "threshold", {}, 20, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choice.json", "scores.csv"]
