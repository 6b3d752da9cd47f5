"""Several processes: the same bytes as one, whoever is killed on the way."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from starts import content, done, finish, images, kill_worker, model_folder, start, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    model_folder(folder / "model")
    images(folder / "colours")
    return folder


def extraction(place: Path, out: Path, *more: object) -> list[object]:
    return [
        "extract", place / "model", place / "colours", "--random-weights", "--out", out,
        "--batch-size", 1, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def single(place: Path) -> dict[str, bytes]:
    done(*extraction(place, place / "single"))
    return content(place / "single" / "features")


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_extract_the_same_bytes(
    place: Path, single: dict[str, bytes], processes: int
) -> None:
    out = place / f"of{processes}"
    said = done(*extraction(place, out), processes=processes)
    assert content(out / "features") == single
    assert said.count("240 items") == 1  # one process speaks
    assert not list(out.rglob("*.part*"))


@pytest.mark.parametrize(("processes", "then"), [(2, 2), (3, 1)])
def test_a_killed_process_ends_all_and_the_next_start_completes(
    place: Path, single: dict[str, bytes], processes: int, then: int
) -> None:
    out = place / f"killed{processes}"
    run = start(*extraction(place, out), processes=processes)
    journal = out / "features" / "colours-train.partial" / "journal.1.jsonl"
    wait_until(journal.exists, run)
    kill_worker(run, 1)
    code, said = finish(run)
    assert code != 0
    assert "SIGKILL" in said or "Signal 9" in said
    assert list((out / "features").iterdir()) == [journal.parent]
    assert journal.read_text().split()  # a quick one may have done its whole share
    done(*extraction(place, out), processes=then)
    assert content(out / "features") == single


@pytest.fixture(scope="module")
def captioned(place: Path) -> Path:
    """Images of one folder, which have captions and no classes."""
    names = sorted(file.relative_to(place) for file in (place / "colours" / "train").rglob("*.png"))
    lines = [f"{name}\ta {name.parent.name} picture, number {i}\n" for i, name in enumerate(names)]
    (place / "captions.tsv").write_text("".join(lines))
    file = place / "told.toml"
    file.write_text(
        'title = "Told"\nfolder = "."\nlayout = "captions"\nsplit_file = "captions.tsv"\n'
        "classes = 0\ntail = { val = 1, test = 1 }\n"
    )
    return file


# Of 6 images all are in the sample; more processes than batches leave one without any.
@pytest.mark.parametrize("items", [6, 230])
def test_sums_of_captions_without_classes_are_those_of_one(
    place: Path, captioned: Path, items: int
) -> None:
    def scores(processes: int) -> pd.DataFrame:
        out = place / f"told{items}of{processes}"
        said = done(
            "extract", place / "model", captioned, "--random-weights", "--data-root", place,
            "--text", "captions", "--items", items, "--streaming", "--batch-size", 4,
            "--out", out, processes=processes,
        )  # fmt: skip
        assert "fisher_ratio (its items have no classes)" in said
        return pd.read_csv(out / "scores.csv")

    one, three = scores(1), scores(3)
    assert {"cka_debiased", "frechet_gap", "effective_rank"} <= set(one["metric"])
    # A Fréchet distance near 0 is what two large numbers leave.
    pd.testing.assert_frame_equal(one, three, rtol=1e-6, atol=1e-9)


def test_sums_over_processes_are_those_of_one(place: Path) -> None:
    arguments = ["--streaming", "--batch-size", 4]
    done(*extraction(place, place / "sums1", *arguments))
    done(*extraction(place, place / "sums3", *arguments), processes=3)
    one, three = (pd.read_csv(place / f"sums{n}" / "scores.csv") for n in (1, 3))
    assert len(one) > 20
    pd.testing.assert_frame_equal(one, three, rtol=1e-7, atol=1e-9)
    assert not (place / "sums3" / "streams").exists()
    assert not (place / "sums3" / "features").exists()


def training(place: Path, out: Path) -> list[object]:
    return [
        "train", place / "model", place / "colours", "--random-weights", "--out", out, "--quiet",
        "--recipe", "mini", "--placement", "2-3", "--seeds", "1,2", "--set", "shots=12",
        "--set", "batch_size=4", "--set", "epochs=4", "--set", "save_every=1",
    ]  # fmt: skip


def table(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "results.csv").drop(columns="seconds")


def test_several_processes_train_what_one_trains_and_resume(place: Path) -> None:
    done(*training(place, place / "train1"))
    run = start(*training(place, place / "train2"), processes=2)
    wait_until(lambda: bool(list((place / "train2").glob("unfinished/*/training.pt"))), run)
    kill_worker(run, 1)
    assert finish(run)[0] != 0
    assert not (place / "train2" / "results.csv").exists()
    done(*training(place, place / "train2"), processes=2)
    one, two = table(place / "train1"), table(place / "train2")
    columns = ["dataset", "split_kind", "method", "placement", "seed", "n"]
    pd.testing.assert_frame_equal(one[columns], two[columns])
    # Two halves of a batch are summed in another order: a prediction on the edge may differ.
    assert (one["accuracy"] - two["accuracy"]).abs().max() <= 1 / one["n"].min() + 1e-9
    assert not (place / "train2" / "unfinished").exists()


def test_several_processes_share_extraction_alone(place: Path) -> None:
    study = place / "study.toml"
    study.write_text(
        f'models = [{{ path = "{place}/model", random_weights = true }}]\n'
        f'datasets = ["{place}/colours"]\n'
    )
    code, said = finish(start("study", study, "--out", place / "study", processes=2))
    assert code != 0
    assert "several processes share the stage 'extract' alone" in said
