"""The paper's tables and figures: right numbers, safe markup, no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import vlmlayers.figures
from vlmlayers.errors import UserError
from vlmlayers.figures import (
    DRAWINGS,
    captions,
    draw_all,
    inputs,
    layout,
    outcomes,
    paper_figures,
    paper_tables,
    render,
)
from vlmlayers.figures.inputs import MissingTable
from vlmlayers.scores import summaries

ELEVEN = (
    "ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101",
    "FGVCAircraft", "SUN397", "DTD", "EuroSAT", "UCF101",
)  # fmt: skip
MANIFEST_NAMES = (
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101",
    "fgvc_aircraft", "sun397", "describable_textures", "eurosat", "ucf101",
)  # fmt: skip


# Test images of the published splits, of one half where they are two.
SIZES = dict(
    zip(
        MANIFEST_NAMES,
        (50000, 2465, 3669, 8041, 2463, 30300, 3333, 19850, 1692, 8100, 3783),
    )
)


@pytest.fixture
def published(repository: Path) -> Path:
    return repository / "figures" / "tables"


def numbers(folder: Path, name: str) -> pd.Series:
    table = pd.read_csv(folder / f"published_{name}.csv", keep_default_na=False)
    return table.set_index(["method", "dataset", "metric"]).value.astype(float)


def harmonic(base: float, novel: float) -> float:
    return 2 / (1 / base + 1 / novel)


# --- published numbers ---------------------------------------------------------------------------


def test_published_numbers_are_those_of_the_shared_paper_tables(
    published: Path, shared_paper: Path
) -> None:
    ours = numbers(published, "base_to_novel")
    theirs = pd.read_csv(shared_paper / "base_to_novel.csv")
    compared = 0
    for row in theirs.to_dict("records"):
        dataset = "average" if row["dataset"].startswith("Average") else row["dataset"]
        method = row["method"].split(" (MaPLe repo")[0]
        for metric, column in (("base", "base_acc"), ("novel", "novel_acc"), ("hm", "hm_printed")):
            if not np.isnan(row[column]):
                assert ours[method, dataset, metric] == row[column]
                compared += 1
    added = ours.loc[["LASP (repository)"]]
    added = pd.concat([added, *(ours[name].loc[list(ELEVEN)] for name in ("KgCoOp", "RPO"))])
    assert compared + len(added) == len(ours)
    for name in ("cross_dataset", "domain_generalization"):
        ours = numbers(published, name)
        theirs = pd.read_csv(shared_paper / f"{name}.csv").set_index("method")
        theirs = theirs.drop(columns=["average_recomputed", "source"]).rename(
            columns={"ImageNet(source)": "ImageNet", "average_printed": "average"}
        )
        for (method, dataset), value in theirs.stack().dropna().items():
            assert ours[method, dataset, "accuracy"] == value
        assert len(ours) == theirs.notna().sum().sum()


SHEET_NAMES = {
    "Pets": "OxfordPets", "Cars": "StanfordCars", "Flowers": "Flowers102", "Food": "Food101",
    "Aircraft": "FGVCAircraft", "SUN": "SUN397", "UCF": "UCF101", "SUN397": "SUN397",
}  # fmt: skip


def test_numbers_of_other_methods_are_those_of_their_sheets(
    published: Path, shared_paper: Path
) -> None:
    """Names and values follow each other there; what is marked as recalled stands nowhere here."""
    ours = numbers(published, "base_to_novel")

    def printed(method: str, start: str, end: str) -> dict[str, list[float]]:
        text = (shared_paper.parent / "methods" / f"{method}.md").read_text(encoding="utf-8")
        part = " ".join(text.split(start)[1].split(end)[0].split())
        pairs = re.findall(r"([A-Z][A-Za-z]+\d*) (\d+\.\d+(?:/\d+\.\d+)*)", part)
        assert len(pairs) >= 11
        return {SHEET_NAMES.get(name, name): list(map(float, v.split("/"))) for name, v in pairs}

    for method, sheet in (
        ("KgCoOp", printed("kgcoop", "HM per dataset, from", "Base/novel, recalled")),
        ("RPO", printed("rpo", "Per-dataset HM (public", "Base / novel, recalled")),
    ):
        assert set(sheet) == set(ELEVEN)
        assert all(ours[method, dataset, "hm"] == value for dataset, (value,) in sheet.items())
        assert set(ours[method].loc[list(ELEVEN)].index.unique("metric")) == {"hm"}
    lasp = printed("lasp", "Repository README (re-run", ", average")
    assert set(lasp) == set(ELEVEN)
    for dataset, values in lasp.items():
        assert ours["LASP (repository)", dataset].loc[["base", "novel", "hm"]].tolist() == values
    assert set(ours["ProDA"].index.unique("dataset")) == {"average"}


def test_few_shot_averages_are_means_of_the_eleven(published: Path) -> None:
    value = numbers(published, "few_shot")
    for method in value.index.unique("method"):
        row = value[method].droplevel("metric")
        assert set(row.index) == {*ELEVEN, "average"}
        rounding = 0.06 if "plot" in method else 0.0051
        assert row[list(ELEVEN)].mean() == pytest.approx(row["average"], abs=rounding), method


def test_base_to_novel_numbers_agree_with_each_other(published: Path) -> None:
    """HM from base and novel, averages from the eleven; what disagrees is flagged, nothing else."""
    table = pd.read_csv(published / "published_base_to_novel.csv", keep_default_na=False)
    value = numbers(published, "base_to_novel")
    flagged = set(
        table[table.flag != ""][["method", "dataset", "metric"]].itertuples(index=False, name=None)
    )
    assert flagged == {("MMA", "UCF101", "novel"), ("MMRL", "DTD", "hm"), ("RPO", "average", "hm")}
    flagged_rows = {key[:2] for key in flagged}
    for method, dataset in {key[:2] for key in value.index}:
        if (method, dataset, "base") not in value.index:
            continue
        base, novel = value[method, dataset, "base"], value[method, dataset, "novel"]
        agrees = abs(harmonic(base, novel) - value[method, dataset, "hm"]) < 0.011
        assert agrees == ((method, dataset) not in flagged_rows), (method, dataset)
    whole = ("CLIP", "CoOp", "CoCoOp", "MaPLe", "PromptSRC", "MMA", "MMRL", "LASP (repository)")
    for method in whole:
        for metric in ("base", "novel"):
            mean = np.mean([value[method, dataset, metric] for dataset in ELEVEN])
            off = abs(mean - value[method, "average", metric]) > 0.0101  # both are rounded
            assert off == ((method, metric) == ("MMA", "novel"))


def test_the_novel_accuracy_that_would_mend_ucf101_is_the_one_in_the_note(published: Path) -> None:
    table = pd.read_csv(published / "published_base_to_novel.csv", keep_default_na=False)
    row = table.query("method == 'MMA' and dataset == 'UCF101' and metric == 'novel'").iloc[0]
    value = numbers(published, "base_to_novel")
    novel = [value["MMA", dataset, "novel"] for dataset in ELEVEN[:-1]]
    mended = 11 * value["MMA", "average", "novel"] - sum(novel)
    assert mended == pytest.approx(78.53, abs=0.06)
    assert harmonic(86.23, 78.53) == pytest.approx(value["MMA", "UCF101", "hm"], abs=0.005)
    assert "78.53" in row.note
    assert row.value == 80.03, "the cell stands as printed"


def test_transfer_averages_are_means_of_their_targets(published: Path) -> None:
    for name, targets in (("cross_dataset", 10), ("domain_generalization", 4)):
        value = numbers(published, name)
        checked = 0
        for method in value.index.unique("method"):
            row = value[method].droplevel("metric").drop("ImageNet", errors="ignore")
            if len(row) == targets + 1:
                mean = row.drop("average").mean()
                assert mean == pytest.approx(row["average"], abs=0.0051), (name, method)
                checked += 1
        assert checked >= 7


def test_adapter_parameters_add_up(published: Path) -> None:
    table = pd.read_csv(published / "published_adapter_params.csv").set_index("metric").value
    assert table["text down 512->32"] == 512 * 32 + 32
    assert table["vision up 32->768"] == 768 * 32 + 768
    assert table.iloc[:5].sum() == table["per layer total"] == 84_320
    assert table["8 layers (5..12)"] == 8 * 84_320


def test_every_published_number_names_its_source(published: Path) -> None:
    paths = sorted(published.glob("published_*.csv"))
    assert len(paths) == 8
    for path in paths:
        assert (pd.read_csv(path, keep_default_na=False).source.str.len() > 5).all(), path


# --- tables --------------------------------------------------------------------------------------


def test_tables_show_the_published_numbers(published: Path, tmp_path: Path) -> None:
    for name in paper_tables.TABLES:
        csv, markdown, latex = paper_tables.draw_table(name, published, tmp_path)
        assert {path.suffix for path in (csv, markdown, latex)} == {".csv", ".md", ".tex"}
        tidy = pd.read_csv(csv)
        assert (tidy.seeds == 0).all()
        assert f"{tidy.value.iloc[-1]:.2f}" in markdown.read_text()
    tidy = pd.read_csv(tmp_path / "table1_base_to_novel.csv")
    assert len(tidy) == 8 * 12 * 3 + 2 * (11 + 3), "of KgCoOp and RPO the HM of each dataset"
    cell = tidy.query("column == 'MMA' and dataset == 'UCF101' and metric == 'Novel'").iloc[0]
    assert (cell.value, cell.flag) == (80.03, "inconsistent as printed")
    methods = pd.read_csv(tmp_path / "table4_averages.csv").method.unique().tolist()
    assert methods[:10] == [
        "CLIP", "CoOp", "CoCoOp", "ProDA", "KgCoOp", "MaPLe", "LASP", "LASP-V", "RPO", "MMA",
    ]  # fmt: skip
    assert {"PromptSRC", "LASP (repository)", "LwEIB (paper)", "MMA++"} < set(methods[10:])
    few = pd.read_csv(tmp_path / "table5_few_shot.csv")
    assert few.method.str.startswith("CLIP-LoRA").any() and "UCF101" in set(few.column)


def test_the_inconsistent_cell_carries_a_dagger_and_a_note(published: Path) -> None:
    table = paper_tables.base_to_novel(published)
    assert "80.03†" in table.markdown()
    assert r"80.03\textsuperscript{\dag}" in table.latex()
    assert "HM(86.23, 80.03) = 83.01" in table.latex()
    assert table.markdown().count("†") == 6, "and those of MMRL and of RPO, whose columns it has"


def results(settings: dict[str, float], datasets: tuple[str, ...], seeds: int = 3) -> pd.DataFrame:
    """Base-to-novel results with accuracies in [0, 1] known in closed form."""
    rows = []
    for method, shift in settings.items():
        for number, dataset in enumerate(datasets):
            for seed in range(1, seeds + 1):
                for half, start in (("base", 0.60), ("novel", 0.50)):
                    size, odd = divmod(SIZES.get(dataset, 100), 2)
                    rows.append({
                        "protocol": "base-to-novel", "method": method, "model": "ViT-B-16",
                        "weights": "openai", "dataset": dataset, "source": dataset,
                        "split_kind": half, "placement": "v5-12,t5-12", "shots": 16, "seed": seed,
                        "accuracy": start + shift + number / 100 + seed / 1000,
                        "n": size + odd * (half == "base"),
                    })  # fmt: skip
    return pd.DataFrame(rows)


def test_an_average_that_several_sources_print_is_the_papers(
    published: Path, tmp_path: Path
) -> None:
    for name in ("three_benchmarks", "base_to_novel"):
        table = pd.read_csv(published / f"published_{name}.csv", keep_default_na=False)
        table = table.assign(value=table["value"].mask(table["dataset"] == "average", 1.0))
        table.to_csv(tmp_path / f"published_{name}.csv", index=False)
    paper = numbers(published, "base_to_novel_average")
    table = paper_tables.averages([tmp_path, published])
    for (method, _, metric), value in paper.items():
        assert table.cell(
            (method,), {"base": "Base", "novel": "Novel", "hm": "HM"}[metric]
        ).value == (pytest.approx(value))
    filled = [row for row in table.rows if row[0] not in {method for method, _, _ in paper.index}]
    found = {table.cell(row, column).value for row in filled for column in table.columns}
    assert 1.0 in found and found <= {1.0, None}, "of what the paper does not print"


def test_own_runs_fill_in(published: Path, tmp_path: Path) -> None:
    """All eleven datasets under their manifest names: columns, averages and HM of averages."""
    results({"mma": 0.1}, MANIFEST_NAMES).to_csv(tmp_path / "results.csv", index=False)
    table = paper_tables.base_to_novel([tmp_path, published])
    own = next(column for column in table.columns if column.startswith("own"))
    for part in ("mma", "v5-12,t5-12", "ViT-B-16", "openai", "16 shots"):
        assert part in own
    assert table.cell(("ImageNet", "Base"), own).value == pytest.approx(70.2)
    assert table.cell(("UCF101", "Novel"), own).value == pytest.approx(70.2)
    assert table.cell(("DTD", "Base"), own).value == pytest.approx(78.2), "describable_textures"
    assert table.cell(("Flowers102", "Base"), own).sd == pytest.approx(0.1)
    base, novel = 70.2 + 5, 60.2 + 5
    average = table.cell(("Average", "HM"), own)
    assert average.value == pytest.approx(harmonic(base, novel))
    assert average.seeds == 3
    assert "± 0.10" in table.markdown()
    assert r"$\pm$" in table.latex()
    assert r"\shortstack[r]{own: mma v5-12,t5-12\\ViT-B-16 (openai)\\16 shots}" in table.latex()
    averages = paper_tables.averages([tmp_path, published])
    assert averages.rows[-1] == (own,)
    assert averages.cell((own,), "HM").value == average.value


def test_zero_shot_rows_stand_as_a_setting_of_their_own(published: Path, tmp_path: Path) -> None:
    rows = results({"zero-shot CLIP": 0.0}, MANIFEST_NAMES, seeds=1)
    rows = rows.assign(placement="", shots=0, seed=-1, source="")
    both = pd.concat([rows, results({"MMA": 0.1}, MANIFEST_NAMES)])
    both.to_csv(tmp_path / "results.csv", index=False)
    table = paper_tables.base_to_novel([tmp_path, published])
    assert table.columns[-2] == "own: zero-shot CLIP, ViT-B-16 (openai)"
    assert str(table.cell(("ImageNet", "Base"), table.columns[-2])) == "60.10", "one seed, no sd"
    assert str(table.cell(("ImageNet", "Base"), table.columns[-1])) == "70.20 ± 0.10"


def test_an_own_average_over_some_datasets_is_not_shown(published: Path, tmp_path: Path) -> None:
    results({"mma": 0.0}, ("eurosat", "my-leaves")).to_csv(tmp_path / "results.csv", index=False)
    table = paper_tables.base_to_novel([tmp_path, published])
    own = table.columns[-1]
    assert table.cell(("EuroSAT", "Base"), own).value == pytest.approx(60.2)
    assert table.cell(("Average", "Base"), own).value is None
    assert table.cell(("my-leaves", "Base"), own).value == pytest.approx(61.2)
    # Published datasets and their average stand once, and behind them what is the user's own.
    names = list(dict.fromkeys(name for name, _ in table.rows))
    assert names[-2:] == ["Average", "my-leaves"] and len(table.rows) == 3 * len(names) == 39
    assert (
        paper_tables.averages([tmp_path, published]).rows == paper_tables.averages(published).rows
    )


def test_own_transfer_runs_fill_in(published: Path, tmp_path: Path) -> None:
    rows = results({"mma": 0.0}, MANIFEST_NAMES).query("split_kind == 'base'").copy()
    rows["protocol"], rows["source"], rows["split_kind"] = "cross-dataset", "imagenet", "all"
    rows.to_csv(tmp_path / "results_transfer.csv", index=False)
    table = paper_tables.cross_dataset([tmp_path, published])
    own = table.rows[-1]
    assert table.cell(own, "ImageNet (source)").value == pytest.approx(60.2)
    assert table.cell(own, "Average").value == pytest.approx(60.2 + 5.5), "without the source"
    assert paper_tables.domain_generalization([tmp_path, published]).rows[-1] == ("MMA++",)


def test_transfers_from_several_sources_are_rows_of_their_own(
    published: Path, tmp_path: Path
) -> None:
    """An accuracy on what a run was trained on stands in no row, column or mean of a transfer."""
    rows = results({"mma": 0.0}, MANIFEST_NAMES).query("split_kind == 'base'")
    rows = rows.assign(protocol="cross-dataset", split_kind="all")
    shifts = {"imagenet": 0.0, "describable_textures": 0.1, "digits": 0.2}
    moved = [rows.assign(source=s, accuracy=rows.accuracy + by) for s, by in shifts.items()]
    within = rows[rows.dataset == "imagenet"].assign(dataset="digits", source="digits", accuracy=1)
    plain = rows.assign(method="zero-shot CLIP", placement="", shots=0, source="")
    pd.concat([*moved, within, plain]).to_csv(tmp_path / "results.csv", index=False)
    table = paper_tables.cross_dataset([tmp_path, published])
    name = "own: mma v5-12,t5-12, ViT-B-16 (openai), 16 shots"
    zero, other = "own: zero-shot CLIP, ViT-B-16 (openai)", f"{name}, from describable_textures"
    digits = f"{name}, from digits"
    assert {row for (row,) in table.rows if row.startswith("own")} == {name, zero, other, digits}
    assert table.columns[-3:] == ["ImageNet", "DTD (source)", "digits (source)"]

    def shown(row: str, *columns: str) -> list[float | None]:
        return [table.cell((row,), column).value for column in columns]

    columns = ("ImageNet (source)", "ImageNet", "DTD", "DTD (source)", "digits (source)", "Average")
    expected: dict[str, list[float | None]] = {
        name: [60.2, None, 68.2, None, None, 65.7],
        zero: [60.2, None, 68.2, None, None, 65.7],
        other: [None, 70.2, None, 78.2, None, None],
        digits: [None, 80.2, 88.2, None, 100.0, 85.7],
    }
    for row, values in expected.items():
        assert shown(row, *columns) == [v if v is None else pytest.approx(v) for v in values], row


def test_own_few_shot_runs_and_two_settings_of_one_method(published: Path, tmp_path: Path) -> None:
    rows = results({"CLIP-LoRA": 0.0}, MANIFEST_NAMES).query("split_kind == 'base'")
    rows = rows.assign(protocol="few-shot", split_kind="all", settings="rank=2")
    wider = rows.assign(settings="rank=4", accuracy=rows.accuracy + 0.1)
    pd.concat([rows, wider]).to_csv(tmp_path / "results.csv", index=False)
    table = paper_tables.few_shot([tmp_path, published])
    (narrow,), (wide,) = table.rows[-2:]
    assert narrow.endswith("16 shots, rank=2") and wide.endswith("16 shots, rank=4")
    assert table.cell((narrow,), "Average").value == pytest.approx(60.2 + 5)
    assert table.cell((wide,), "DTD").value == pytest.approx(78.2)
    assert not any("source" in column for column in table.columns)


def test_seeds_of_two_recipes_are_not_pooled(published: Path, tmp_path: Path) -> None:
    rows = results({"mma": 0.0}, ("eurosat",)).assign(recipe="mini")
    for name, part in {"one": rows[rows.seed < 3], "two": rows[rows.seed > 2]}.items():
        (tmp_path / name).mkdir()
        recipe = "mini" if name == "one" else "mini epochs=3"
        part.assign(recipe=recipe).to_csv(tmp_path / name / "results.csv", index=False)
    table = paper_tables.base_to_novel([tmp_path / "one", tmp_path / "two", published])
    own = [column for column in table.columns if column.startswith("own")]
    setting = "own: mma v5-12,t5-12, ViT-B-16 (openai), 16 shots"
    assert own == [f"{setting}, recipe mini", f"{setting}, recipe mini epochs=3"]
    assert [table.cell(("EuroSAT", "Base"), one).seeds for one in own] == [2, 1]
    assert any("seeds (1 to 2 in a cell)" in note for note in table.footnotes())


def test_runs_that_disagree_on_a_cell_are_settings_of_their_own(
    published: Path, tmp_path: Path
) -> None:
    """Other recipes or weights under the same names; what agrees are seeds of one setting."""
    rows = results({"mma": 0.0}, ("eurosat",))
    runs = {"first": rows[rows.seed < 3], "more": rows[rows.seed > 1],
            "other": rows[rows.seed > 2].assign(accuracy=0.9),
            "single": rows.assign(shots=1)}  # fmt: skip
    for name, part in runs.items():
        (tmp_path / name).mkdir()
        part.to_csv(tmp_path / name / "results.csv", index=False)

    def seeds(*names: str) -> dict[str, int]:
        table = paper_tables.base_to_novel([*(tmp_path / name for name in names), published])
        own = [column for column in table.columns if column.startswith("own")]
        return {one: table.cell(("EuroSAT", "Base"), one).seeds for one in own}

    setting = "own: mma v5-12,t5-12, ViT-B-16 (openai), 16 shots"
    assert seeds("first", "more") == {setting: 3}
    named = {name: f"{setting}, {inputs.short(tmp_path / name)}" for name in runs}
    assert seeds("more", "other") == {named["more"]: 2, named["other"]: 1}
    assert seeds("single") == {setting.replace("16 shots", "1 shot"): 3}


def test_zero_shot_rows_of_two_templates_have_no_common_mean(
    published: Path, tmp_path: Path
) -> None:
    """With each dataset's own template they have."""
    kinds = {"zero-shot CLIP": "a {}.", "zero-shot CLIP, dataset template": "a leaf: {}."}
    for name, dataset in (("one", "eurosat"), ("two", "describable_textures")):
        rows = results(dict.fromkeys(kinds, 0.0), (dataset,), seeds=1)
        rows = rows.assign(placement="", shots=0, seed=-1, source="")
        rows["template"] = [kinds[method] if name == "one" else "{}?" for method in rows.method]
        (tmp_path / name).mkdir()
        rows.to_csv(tmp_path / name / "results.csv", index=False)
    table = paper_tables.base_to_novel([tmp_path / "one", tmp_path / "two", published])
    assert [column for column in table.columns if column.startswith("own")] == [
        "own: zero-shot CLIP, ViT-B-16 (openai), a {}.",
        "own: zero-shot CLIP, dataset template, ViT-B-16 (openai)",
        "own: zero-shot CLIP, ViT-B-16 (openai), {}?",
    ]


def test_own_cells_of_other_images_or_with_a_note_are_marked(
    published: Path, tmp_path: Path
) -> None:
    """A folder that has a published dataset's name only, or a part of one, is no equal of it."""
    rows = results({"mma": 0.0}, MANIFEST_NAMES).assign(note="")
    rows.loc[rows.dataset == "eurosat", "n"] = 20
    rows.loc[(rows.dataset == "sun397") & (rows.seed == 1), "note"] = "changed nothing: raise lr"
    rows.to_csv(tmp_path / "results.csv", index=False)
    table = paper_tables.base_to_novel([tmp_path, published])
    own = table.columns[-1]
    marked = {row[0] for row in table.rows if table.cell(row, own).flag}
    assert marked == {"EuroSAT", "SUN397", "Average"}
    remarks = [
        "EuroSAT: tested on 40 images, the published split has 8,100",
        "SUN397: changed nothing: raise lr",
    ]

    def under(table: render.PaperTable, own: str) -> list[str]:
        last = table.footnotes()[-1]
        assert last.startswith(f"† {own}: ") and last.endswith(".")
        return sorted(last.removeprefix(f"† {own}: ")[:-1].split(" · "))

    assert under(table, own) == remarks
    assert not any(own in note for note in table.footnotes()[:-1])
    averages = paper_tables.averages([tmp_path, published])
    assert averages.cell((own,), "HM").flag and under(averages, own) == remarks
    (tmp_path / "old").mkdir()  # a table without what was recorded later is none of 0 images
    rows.drop(columns=["n", "note"]).to_csv(tmp_path / "old" / "results.csv", index=False)
    whole = paper_tables.base_to_novel([tmp_path / "old", published])
    assert not any("†" in note and "own" in note for note in whole.footnotes())
    moved = rows[rows.split_kind == "base"].assign(protocol="cross-dataset", split_kind="all")
    moved = moved.assign(source="imagenet", n=rows.dataset.map(SIZES).where(rows.n != 20, 40))
    moved.to_csv(tmp_path / "results.csv", index=False)
    table = paper_tables.cross_dataset([tmp_path, published])
    assert under(table, *table.rows[-1]) == remarks
    assert [c for c in table.columns if table.cell(table.rows[-1], c).flag] == [
        "SUN397", "EuroSAT", "Average",
    ]  # fmt: skip


def test_a_results_table_without_its_columns_is_refused(published: Path, tmp_path: Path) -> None:
    results({"mma": 0.0}, ("eurosat",)).drop(columns="shots").to_csv(tmp_path / "results.csv")
    with pytest.raises(UserError, match=r"results\.csv has no column 'shots'"):
        paper_tables.base_to_novel([tmp_path, published])


def test_markup_in_names_is_escaped() -> None:
    name = r"a_b & 50% {x} <i>|c\d ~ ^ #1 $"
    cells = {((name,), name): render.TableCell(1.0, flag="bad_flag", note="n_1")}
    table = render.PaperTable("t_1", name, ("Method",), [(name,)], [name], cells)
    latex = table.latex()
    prose = "".join(line for line in latex.splitlines() if "50" in line or "flag" in line)
    assert len(prose) > 200
    assert not re.search(r"(?<!\\)[_%#$^~]", prose)
    assert not re.search(r"[<>|]", prose)
    body = next(line for line in latex.splitlines() if "1.00" in line)
    assert body.count(" & ") == 1, "one cell boundary"
    assert body.endswith(r"\\")
    line = table.markdown().splitlines()[4]
    assert line.replace(r"\|", "").count("|") == 3
    assert "<i>" not in line


def test_latex_braces_and_environments_balance(published: Path) -> None:
    for draw in paper_tables.TABLES.values():
        latex = draw(published).latex()
        plain = latex.replace(r"\{", "").replace(r"\}", "")
        assert plain.count("{") == plain.count("}")
        for name in ("table*", "tabular"):
            assert latex.count(rf"\begin{{{name}}}") == latex.count(rf"\end{{{name}}}") == 1
        columns = latex.split(r"\begin{tabular}{", 1)[1].split("}", 1)[0]
        cells = [line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\")]
        assert set(cells) == {len(columns) - 1}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(published: Path, tmp_path: Path) -> None:
    written = [
        paper_tables.draw_table(name, published, tmp_path)[2] for name in paper_tables.TABLES
    ]
    inputs_ = "\n".join(rf"\input{{{path.name}}}" for path in written)
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
        f"{inputs_}\n\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:]


# --- reading -------------------------------------------------------------------------------------


def test_read_joins_files_and_keeps_names_as_text(tmp_path: Path) -> None:
    first = pd.DataFrame({"position": ["5", "embed"], "other_tower": ["", ""], "value": [0.5, 0.1]})
    first.to_csv(tmp_path / "scores.csv", index=False)
    first.assign(value=0.9).to_parquet(tmp_path / "scores.parquet")
    first.to_csv(tmp_path / "scores_more.csv", index=False)
    table = inputs.read("scores", tmp_path)
    assert table.position.tolist() == ["5", "embed"] * 2
    assert sorted(table.value) == [0.1, 0.5, 0.9, 0.9], "Parquet stands for the CSV of its name"
    assert set(table.other_tower) == {""}
    for derived in ("placements", "correlations", "predicted"):
        (tmp_path / f"scores_{derived}.csv").write_text("nothing,of,this\n")
    assert len(inputs.read("scores", tmp_path)) == 4, "what validate writes beside its cells"
    with pytest.raises(MissingTable, match=r"no cost\*\.csv in .*record one"):
        inputs.read("cost", tmp_path)
    with pytest.raises(MissingTable, match="hold no gap; record"):
        inputs.select(table, "gap", position="7")


# --- figures -------------------------------------------------------------------------------------

BLOCKS = 4
POSITIONS = ("embed", *(str(block) for block in range(1, BLOCKS + 1)), "proj")
RECORDED = (*POSITIONS[:-1], "final", "proj")


def score_rows(model: str = "tiny") -> pd.DataFrame:
    """Scores with planted values: dataset accuracy rises, the gap falls, agreement is a product."""
    rows = []
    plain = {"model": model, "weights": "w", "dataset": "*", "split": "train", "pooling": "model",
             "space": "native", "n": 40, "seed": -1, "other_tower": "", "other_position": "",
             "options": "", "null": 0.1}  # fmt: skip

    def add(position: str, **values: object) -> None:
        depth = min(RECORDED.index(position), BLOCKS) / BLOCKS
        row = plain | {"tower": "vision", "position": position, "depth": depth} | values
        rows.append(row | {"low": row["value"] - 0.02, "high": row["value"] + 0.02})

    for tower in ("vision", "text"):
        for seed in (1, 2, 3):
            add("final", tower=tower, metric="dataset_accuracy", value=0.7, seed=seed)
    for index, position in enumerate(POSITIONS):
        for tower, start in (("vision", 0.2), ("text", 0.3)):
            for seed in (1, 2, 3):
                value = start + 0.1 * index + 0.01 * seed
                add(position, tower=tower, metric="dataset_accuracy", value=value, seed=seed)
        for dataset in ("digits", "a_b"):
            for metric in ("centroid_gap", "pair_distance"):
                add(position, metric=metric, value=1.2 - 0.1 * index, dataset=dataset,
                    space="joint", other_tower="text", other_position=position)  # fmt: skip
        for other_index, other in enumerate(POSITIONS):
            add(position, metric="cka_debiased", value=0.02 * index * other_index,
                other_tower="text", other_position=other)  # fmt: skip
    return pd.DataFrame(rows)


def validation_rows(model: str = "tiny") -> pd.DataFrame:
    """Spans from every start block, the chosen off the axis; hm rises by 1 with the start."""
    kinds = {"v1-4,t1-4": "all+start", "v2-4,t2-4": "paper+start", "v3-4,t3-4": "start",
             "v4,t4": "start", "v2-4,t3-4": "chosen", "v1+3,t1+3": "random"}  # fmt: skip
    rows = []
    for number, (placement, kind) in enumerate(kinds.items()):
        for dataset, easy in (("digits", 10.0), ("a_b", 0.0)):
            for seed in (1, 2):
                hm = 50 + easy + number + seed / 10
                rows.append({
                    "model": model, "weights": "w", "dataset": dataset, "shots": 4, "seed": seed,
                    "placement": placement, "kind": kind, "parameters": 1000 * (6 - number),
                    "base": hm + 5, "novel": hm - 5, "hm": hm, "seconds": 10.0 + seed,
                })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    score_rows().to_csv(folder / "scores.csv", index=False)
    validation_rows().to_csv(folder / "validation.csv", index=False)
    evidence = {"model": "tiny", "weights": "w"}
    choice = {"vision": [2, 3, 4], "text": [3, 4], "rule": "threshold", "evidence": evidence}
    (folder / "choice.json").write_text(json.dumps(choice))
    return folder


def test_all_scripts_are_thin_and_draw_without_torch(
    repository: Path, tables: Path, tmp_path: Path
) -> None:
    scripts = {path.stem for path in (repository / "figures").glob("[ft]*[0-9]_*.py")}
    assert scripts == set(DRAWINGS)
    for name in scripts:
        text = (repository / "figures" / f"{name}.py").read_text()
        assert f'DRAWINGS["{name}"]' in text
        assert len(text.splitlines()) <= 15
    code = (
        "import sys, runpy; sys.argv[1:] = "
        f"[{str(tables)!r}, '--out', {str(tmp_path)!r}]; "
        f"sys.path.insert(0, {str(repository / 'figures')!r}); "
        f"runpy.run_path({str(repository / 'figures' / 'all.py')!r}, run_name='__main__'); "
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "11 of 11 drawn" in run.stdout
    for name in paper_figures.FIGURES:
        for suffix in ("pdf", "svg", "png", "csv"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 100


def test_a_script_without_its_table_says_so_in_one_line(repository: Path, tmp_path: Path) -> None:
    for name, folder, said in (
        ("fig6_cost", tmp_path, "no validation*.csv"),
        ("all", tmp_path / "absent", "absent is not a folder"),
    ):
        script = repository / "figures" / f"{name}.py"
        run = subprocess.run([sys.executable, script, folder, "--out", tmp_path / "out"],
                             capture_output=True, text=True, check=False)  # fmt: skip
        assert run.returncode == 2 and said in run.stderr
        assert run.stderr.count("\n") == 1
    skipped = draw_all(tmp_path, tmp_path / "out", ["fig1_dataset_recognition"])
    assert skipped[0].words.startswith("skipped: no scores*.csv")
    assert max(map(len, skipped[0].line.splitlines())) <= 80
    with pytest.raises(UserError, match="did you mean 'fig2_gap'"):
        draw_all(tmp_path, tmp_path, ["fig2_gaps"])
    (tmp_path / "file").touch()
    for name in ("fig6_cost", "table5_few_shot"):  # no figure is missing a table here
        with pytest.raises(UserError, match="cannot write .*; choose a folder that can be"):
            draw_all(repository / "figures" / "tables", tmp_path / "file" / "out", [name])


def test_tables_of_several_folders_that_contradict_are_told(tables: Path, tmp_path: Path) -> None:
    """What they hold besides is drawn: one refused validation ended the whole command."""
    shutil.copytree(tables, tmp_path / "again")
    for path in (tmp_path / "again").glob("scores*"):
        path.unlink()
    names = ["fig4_placement_sweep", "fig2_gap"]
    refused, drawn = draw_all([tables, tmp_path / "again"], tmp_path / "out", names)
    assert refused.reason.startswith("the tables of all folders are drawn as one, and")
    assert "several trainings of v1-4,t1-4 on digits, seed 1" in refused.reason
    assert not refused.paths and drawn.paths


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"recipe": {"name": "mini", "lr": 0.1}}, "lr=0.1, .*first/validation with lr=0.03"),
        ({"settings": {"scale": 1}}, "scale=1, "),
        ({"weights_hash": "b"}, "weights_hash=b, "),
        ({"recipe": {"name": "mine", "lr": 0.03}}, ""),
    ],
)
def test_seeds_of_validations_by_other_recipes_are_not_pooled(
    other: dict[str, object], told: str, tmp_path: Path
) -> None:
    rows = validation_rows()
    recipe = {"recipe": {"name": "mini", "lr": 0.03}, "settings": {"scale": 0.1}}
    recipe |= {"weights_hash": "a"}
    for name, seed, how in (("first", 1, recipe), ("second", 2, recipe | other)):
        (tmp_path / name).mkdir()
        rows[rows.seed == seed].to_csv(tmp_path / name / "validation.csv", index=False)
        (tmp_path / name / "validation.json").write_text(json.dumps(how))
    folders = [tmp_path / "first", tmp_path / "second"]
    if told:
        with pytest.raises(UserError, match=f"second/validation trained tiny with {told}"):
            outcomes.read_validations(folders)
    else:
        assert len(outcomes.read_validations(folders)) == len(rows)


def test_validations_at_tuned_amounts_are_not_pooled_with_others(tmp_path: Path) -> None:
    rows = validation_rows()
    for name, seed, kind in (("first", 1, {}), ("second", 2, {"comparison": "tuned"})):
        (tmp_path / name).mkdir()
        rows[rows.seed == seed].assign(**kind).to_csv(tmp_path / name / "validation.csv")
    with pytest.raises(UserError, match="comparison=tuned, .*first/validation with comparison=gi"):
        outcomes.read_validations([tmp_path / "first", tmp_path / "second"])


ITEMS = {"name": "digits", "split": "train", "items": 9, "items_hash": "a", "template": "{}"}


@pytest.mark.parametrize(
    ("rows", "record", "told"),
    [
        ({}, {}, ""),
        ({"options": "normalise=none"}, {}, "normalise=none, .*first/scores with normalise=col"),
        ({"options": "normalise=columns;ceiling=0.9"}, {}, ""),
        ({"n": 20}, {}, "n=20, .*first/scores with n=40"),
        ({}, {"weights": "other"}, "weights_hash=other, .*first/scores with weights_hash=same"),
        ({}, {"name": "flags"}, r"datasets=flags \(train\), .* with datasets=digits \(train\)"),
        ({}, {"split": "val"}, r"datasets=digits \(val\), "),
        ({}, {"items": 8}, r"items of digits \(train\)=8, "),
        ({}, {"items_hash": "b"}, r"items_hash of digits \(train\)=b, "),
        ({}, {"template": "a {}."}, r"template of digits \(train\)=a {}\., "),
    ],
)
def test_only_tables_made_alike_are_averaged_as_seeds(
    rows: dict[str, object], record: dict[str, str], told: str, tmp_path: Path
) -> None:
    scores = score_rows().query("metric == 'dataset_accuracy'").assign(options="normalise=columns")
    folders = [tmp_path / name for name in ("first", "second")]
    for folder, part, other in zip(
        folders, (scores[scores.seed < 3], scores[scores.seed == 3].assign(**rows)), ({}, record)
    ):
        folder.mkdir()
        part.to_csv(folder / "scores.csv", index=False)
        made = ITEMS | other
        weights = {"weights_hash": made.pop("weights", "same")}
        (folder / "provenance.json").write_text(
            json.dumps({"model": weights, "datasets": {"digits-train": made}})
        )
    if told:
        with pytest.raises(UserError, match=f"second/scores scored tiny with {told}"):
            paper_figures.fig1_dataset_recognition(folders, tmp_path)
        return
    paper_figures.fig1_dataset_recognition(folders, tmp_path)
    drawn = pd.read_csv(tmp_path / "fig1_dataset_recognition.csv")
    assert set(drawn.seeds) == {3} and len(drawn) == 2 * len(POSITIONS)


def test_seeds_whose_parts_are_split_by_class_may_have_other_numbers_of_items(
    tmp_path: Path,
) -> None:
    scores = score_rows().query("metric == 'dataset_accuracy'")
    scores = scores.assign(n=scores.n + scores.seed)
    for split, refused in (("item", True), ("class", False)):
        for seed in (1, 2):
            part = scores[scores.seed == seed].assign(options=f"split_by={split}")
            part.to_csv(tmp_path / f"scores_{seed}.csv", index=False)
        if refused:
            with pytest.raises(UserError, match="scored tiny with n=42, .*scores_1 with n=41"):
                paper_figures.fig1_dataset_recognition(tmp_path, tmp_path)
        else:
            paper_figures.fig1_dataset_recognition(tmp_path, tmp_path)


def test_captions_name_untrained_models_and_what_is_averaged() -> None:
    def table(*models: tuple[str, str]) -> pd.DataFrame:
        return pd.DataFrame(models, columns=["model", "weights"]).assign(
            dataset=["a", "b", "b"][: len(models)], seed=1, comparison="given"
        )

    words = "RANDOM WEIGHTS, which says nothing about a trained model"
    for models, first, rest in (
        ((("x", "w"), ("y", "")), "Drawn.", "x (w) and y. Trained: x w on 1"),
        ((("x", "w"), ("y", "random")), f"Drawn. x (w) and y (random); y (random): {words}.", "Tr"),
        ((("y", "random"),), f"Drawn. y (random): {words}.", "Trained on 1 dataset (a), seed 1."),
    ):
        said = captions.trained("Drawn", table(*models))
        assert said[0] == first and said[1].startswith(rest)
    both = table(("x", "w"), ("x", "w"))
    assert captions.mean_over([both[:1], both], "dataset", "seed") == ", mean over datasets"
    assert captions.mean_over([both.assign(seed=[1, 2])], "dataset", "seed") == (
        ", mean over datasets and seeds"
    )
    assert captions.mean_over([both[:1], both[1:]], "dataset", "seed") == ""
    assert captions.trained("Drawn", both, {"x (w)": "nothing holds", "y": ""})[0] == (
        "Drawn. Of x (w) nothing holds."
    )


def test_a_line_parts_own_rows_from_published_ones_and_a_note_counts_their_seeds(
    published: Path, tmp_path: Path
) -> None:
    rows = results({"mma": 0.1}, MANIFEST_NAMES)
    all_classes = rows[rows.split_kind == "base"].assign(split_kind="all")
    lone = all_classes.assign(protocol="few-shot")
    moved = [
        all_classes.assign(protocol=name, source="imagenet")
        for name in ("cross-dataset", "domain-generalization")
    ]
    pd.concat([rows, lone[(lone.dataset != "eurosat") | (lone.seed == 1)], *moved]).to_csv(
        tmp_path / "results.csv", index=False
    )
    for name, draw in paper_tables.TABLES.items():
        alone, table = draw(published), draw([tmp_path, published])
        if name == "table1_base_to_novel":
            starts = {row for row, (_, metric) in enumerate(table.rows) if metric == "Base"}
            assert table.rules == starts - {0}
        else:
            own = [row for row, (method,) in enumerate(table.rows) if method.startswith("own: ")]
            assert not alone.rules and table.rules == {len(alone.rows)} == {own[0]}, name
        assert not alone.notes
        counted = "1 to 3" if name == "table5_few_shot" else "3"
        assert f"over seeds ({counted} in a cell)" in table.notes[0], name


def test_values_without_a_seed_of_other_items_are_told_as_such(tmp_path: Path) -> None:
    """They were called scorings with other options."""
    for name, items in (("first", 9), ("second", 8)):
        (tmp_path / name).mkdir()
        gaps = score_rows().query("metric == 'centroid_gap'").assign(value=items / 10)
        gaps.to_csv(tmp_path / name / "scores.csv", index=False)
        made = {"datasets": {"digits-train": ITEMS | {"items": items}}}
        (tmp_path / name / "provenance.json").write_text(json.dumps(made))
    told = r"second/scores scored tiny with items of digits \(train\)=8, .*first/scores with"
    with pytest.raises(UserError, match=told):
        paper_figures.fig2_gap([tmp_path / "first", tmp_path / "second"], tmp_path)


def test_what_takes_no_seed_may_stand_alike_in_tables_of_several_seeds(tmp_path: Path) -> None:
    scores = score_rows()
    gap = scores[scores.metric == "centroid_gap"].assign(seed=-1)
    gap = gap.drop_duplicates(["dataset", "tower", "position"])
    folders = [tmp_path / name for name in ("first", "second", "other")]
    for folder, part in zip(folders, (gap, gap, gap.assign(value=gap.value + 0.1))):
        folder.mkdir()
        part.to_csv(folder / "scores.csv", index=False)
    paper_figures.fig2_gap(folders[:2], tmp_path)
    assert (tmp_path / "fig2_gap.csv").exists()
    with pytest.raises(UserError, match="several values of centroid_gap"):
        paper_figures.fig2_gap(folders[1:], tmp_path)


def test_tables_without_a_record_are_told_apart_by_their_datasets(tmp_path: Path) -> None:
    """Of pooled rows alone nothing tells of which datasets they are."""
    scores = score_rows()
    scores[scores.seed < 3].to_csv(tmp_path / "scores_one.csv", index=False)
    other = scores[(scores.seed == 3) | (scores.metric == "pair_distance")]
    other.replace({"dataset": {"a_b": "flags"}}).to_csv(tmp_path / "scores_two.csv", index=False)
    with pytest.raises(UserError, match=r"scores_two .* with datasets=digits \(train\), flags "):
        paper_figures.fig1_dataset_recognition(tmp_path, tmp_path)
    other[other.seed == 3].to_csv(tmp_path / "scores_two.csv", index=False)
    paper_figures.fig1_dataset_recognition(tmp_path, tmp_path)
    assert set(pd.read_csv(tmp_path / "fig1_dataset_recognition.csv").seeds) == {3}


def test_figure_1_shows_mean_and_sd_over_seeds(tables: Path, tmp_path: Path) -> None:
    paper_figures.fig1_dataset_recognition(tables, tmp_path)
    drawn = pd.read_csv(tmp_path / "fig1_dataset_recognition.csv", dtype={"position": str})
    drawn = drawn.set_index(["tower", "position"])
    for tower, start in (("vision", 0.2), ("text", 0.3)):
        assert drawn.loc[tower].index.tolist() == list(POSITIONS), "without final, as in the paper"
        for index, position in enumerate(POSITIONS):
            row = drawn.loc[(tower, position)]
            assert row.value == pytest.approx(start + 0.1 * index + 0.02)
            assert row.high - row.value == pytest.approx(0.01), "one sd over the seeds"
            assert row.value - row.low == pytest.approx(0.01)


def test_figure_1_takes_the_readout_that_is_there(tables: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(tables / "scores.csv", dtype={"position": str, "other_position": str})
    rows = rows.replace({"metric": {"dataset_accuracy": "dataset_accuracy_ncm"}})
    rows.to_csv(tmp_path / "scores.csv", index=False)
    paper_figures.fig1_dataset_recognition(tmp_path, tmp_path / "out")
    drawn = pd.read_csv(tmp_path / "out" / "fig1_dataset_recognition.csv")
    assert set(drawn.metric) == {"dataset_accuracy_ncm"}
    svg = (tmp_path / "out" / "fig1_dataset_recognition.svg").read_text()
    assert "nearest mean" in svg


def test_figure_1_draws_what_shared_prompts_leave_possible(tables: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(tables / "scores.csv", dtype={"position": str, "other_position": str})
    of_text = (rows["metric"] == "dataset_accuracy") & (rows["tower"] == "text")
    for most, number in (("", 0), ("ceiling=0.75", 1)):
        rows["options"] = np.where(of_text, most, "")
        rows.to_csv(tmp_path / "scores.csv", index=False)
        paper_figures.fig1_dataset_recognition(tmp_path, tmp_path / "out")
        drawn = (tmp_path / "out" / "fig1_dataset_recognition.svg").read_text()
        caption = (tmp_path / "out" / "fig1_dataset_recognition.tex").read_text()
        assert ("Most possible, text" in drawn) == bool(number)
        assert caption.count("Dotted: the most possible") == number


def test_a_legend_is_no_wider_than_its_figure() -> None:
    figure, (ax,) = layout.panels(1, 1, 2.0)
    for name in ("Vision", "Text", "Chance", "Most possible, text", "Chosen blocks"):
        ax.plot([0, 1], label=name)
    layout.shared_legend(figure, [ax], 5)
    assert len(figure.legends) == 1 and len(figure.legends[0].get_texts()) == 5
    figure.draw_without_rendering()
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1


def test_every_saved_table_names_model_and_weights(tables: Path, tmp_path: Path) -> None:
    for name, draw in paper_figures.FIGURES.items():
        draw(tables, tmp_path)
        drawn = pd.read_csv(tmp_path / f"{name}.csv")
        assert list(drawn.columns[:2]) == ["model", "weights"], name
        assert set(drawn.weights) == {"w"} and set(drawn.model) == {"tiny"}, name


def test_every_figure_has_a_caption_that_says_how_it_was_made(tables: Path, tmp_path: Path) -> None:
    found = {}
    for name, draw in paper_figures.FIGURES.items():
        draw(tables, tmp_path)
        text = (tmp_path / f"{name}.tex").read_text()
        assert rf"\includegraphics[width=\linewidth]{{{name}}}" in text
        said, *rest = re.search(r"\\caption\{(.*?)\n\}\n", text, re.DOTALL)[1].splitlines()
        assert len(said) < 200 and (not rest or rest[0] == "% the next line can be dropped"), name
        found[name] = " ".join([said, *rest[1:]])
        assert "tiny (w)" in found[name], name
    first = found["fig1_dataset_recognition"]
    assert r"bands: $\pm$ one standard deviation over seeds" in first and "interval" not in first
    drawn = score_rows().query("metric == 'dataset_accuracy'")
    for tower in ("vision", "text"):
        count = drawn[drawn.tower == tower].n.max()
        assert f"{count} ({tower})" in first
    assert (
        "seeds 1, 2, 3" in first and "native space" in first and "pooling model (vision)" in first
    )
    assert set(pd.read_csv(tmp_path / "fig1_dataset_recognition.csv").seeds) == {3}
    trained = found["fig4_placement_sweep"]
    assert f"Trained on {validation_rows().dataset.nunique()} datasets" in trained
    random = score_rows().assign(weights="random")
    said = captions.scored("Opening", random, ["dataset_accuracy"])
    assert "tiny (random): RANDOM WEIGHTS" in said[0]
    both = pd.concat([score_rows(), random])
    said = captions.scored("Opening", both, ["dataset_accuracy"])
    assert "tiny (w) and tiny (random); tiny (random): RANDOM WEIGHTS" in said[0]


def test_captions_promise_no_mark_that_is_not_drawn(tables: Path, tmp_path: Path) -> None:
    """Of one seed there is no spread, without a choice no strip."""
    marks = {
        "fig1_dataset_recognition": ["Mean over seeds; bands: ", "Strips: the chosen", "Dashed: c"],
        "fig2_gap": ["Bands: 95", "Dashed and grey: chance"],
        "fig3_agreement": [", mean over seeds", "Bars beside the axes: the chosen blocks"],
        "fig4_placement_sweep": ["block, mean over datasets and seeds", "Bands: "],
        "fig5_predicted_vs_trained": ["placement, mean over datasets and seeds"],
    }
    scores, cells = score_rows(), validation_rows()
    agreements = scores[scores.metric == "cka_debiased"]
    (tmp_path / "all").mkdir()
    more = pd.concat([scores, agreements.assign(seed=1), agreements.assign(seed=2)])
    more.to_csv(tmp_path / "all" / "scores.csv", index=False)
    for name in ("validation.csv", "choice.json"):
        shutil.copy(tables / name, tmp_path / "all" / name)
    (tmp_path / "one").mkdir()
    one = scores[scores.seed < 2].assign(null=float("nan"), low=float("nan"), high=float("nan"))
    one.to_csv(tmp_path / "one" / "scores.csv", index=False)
    single = cells[(cells.seed == 1) & (cells.dataset == "digits")]
    single.to_csv(tmp_path / "one" / "validation.csv", index=False)
    for name, words in marks.items():
        for folder, there in (("all", True), ("one", False)):
            paper_figures.FIGURES[name](tmp_path / folder, tmp_path / folder)
            caption = (tmp_path / folder / f"{name}.tex").read_text()
            assert [word in caption for word in words] == [there] * len(words), caption
    scores[scores.tower == "vision"].to_csv(tmp_path / "scores.csv", index=False)
    paper_figures.fig1_dataset_recognition(tmp_path, tmp_path)
    caption = (tmp_path / "fig1_dataset_recognition.tex").read_text()
    assert "at every position of the vision tower." in caption and "both" not in caption


@pytest.mark.parametrize("pooled", [True, False])
def test_figure_3_says_whether_datasets_are_pooled(pooled: bool, tmp_path: Path) -> None:
    """Pooled rows are drawn where there are any; they are no mean of those of each dataset."""
    scores = score_rows().query("metric == 'cka_debiased'")
    each = [scores.assign(dataset=name, value=v, n=9) for name, v in (("a", 0.3), ("b", 0.5))]
    pd.concat([*each, *([scores] * pooled)]).to_csv(tmp_path / "scores.csv", index=False)
    paper_figures.fig3_agreement(tmp_path, tmp_path)
    drawn = pd.read_csv(tmp_path / "fig3_agreement.csv").value.to_numpy()
    assert np.allclose(drawn, scores.value if pooled else 0.4)
    words = ("all datasets pooled", "40") if pooled else ("mean over 2 datasets", "9")
    caption = (tmp_path / "fig3_agreement.tex").read_text()
    assert f"position, {words[0]}." in caption and f"n = {words[1]} (vision)" in caption


def test_a_choice_marks_its_own_model_only(tables: Path) -> None:
    choice, unlike = paper_figures.choice_of(score_rows(), tables)
    assert (choice.vision, choice.text) == ((2, 3, 4), (3, 4)) and not unlike
    assert paper_figures.choice_of(score_rows("another"), tables) == (None, "")


@pytest.mark.parametrize("vision", [(2, 3, 4), (4,)])
def test_runs_that_chose_otherwise_have_no_choice_in_common(
    vision: tuple[int, ...], tables: Path, tmp_path: Path
) -> None:
    """That of the first folder was drawn over the mean of all."""
    recorded = json.loads((tables / "choice.json").read_text())
    (tmp_path / "choice.json").write_text(json.dumps(recorded | {"vision": vision}))
    said = "Of tiny (w) no choice is marked, as runs chose v2-4,t3-4 and v4,t3-4."
    alike = vision == (2, 3, 4)
    for name in ("fig1_dataset_recognition", "fig3_agreement", "fig4_placement_sweep",
                 "fig5_predicted_vs_trained"):  # fmt: skip
        paper_figures.FIGURES[name]([tables, tmp_path], tmp_path)
        caption = (tmp_path / f"{name}.tex").read_text()
        assert (said in caption) != alike, caption
        assert ("chosen blocks" in caption) == (alike and name[:4] in ("fig1", "fig3"))
        drawn = "chosen" in (tmp_path / f"{name}.svg").read_text().lower()
        assert drawn == (alike and name != "fig3_agreement"), "bars there have no words"


@pytest.mark.parametrize("made_of", ["a" * 64, "b" * 64])
def test_a_choice_of_other_weights_of_that_name_is_not_marked(
    made_of: str, tables: Path, tmp_path: Path
) -> None:
    """Two checkpoints share a name; their hashes stand beside the tables and beside the choice."""
    drawn, chosen = tmp_path / "drawn", tmp_path / "chosen"
    for folder, weights, names in (
        (drawn, "a" * 64, ("scores.csv", "validation.csv")),
        (chosen, made_of, ("choice.json",)),
    ):
        folder.mkdir()
        for name in names:
            shutil.copy(tables / name, folder / name)
        record = {"model": {"weights_hash": weights}}
        (folder / "provenance.json").write_text(json.dumps(record))
    (drawn / "validation.json").write_text(json.dumps({"weights_hash": "a" * 64}))
    for name in ("fig1_dataset_recognition", "fig3_agreement", "fig4_placement_sweep",
                 "fig5_predicted_vs_trained"):  # fmt: skip
        paper_figures.FIGURES[name]([drawn, chosen], tmp_path)
        caption = (tmp_path / f"{name}.tex").read_text()
        said = "choice.json is of weights" in caption and "hash=bbbbbbbbbbbb and what" in caption
        assert said == (made_of != "a" * 64), caption
        svg = (tmp_path / f"{name}.svg").read_text().lower()
        assert ("chosen" in svg) == (not said and name != "fig3_agreement")
        assert ("chosen blocks" in caption) == (not said and name[:4] in ("fig1", "fig3"))


def test_figure_4_orders_spans_and_sets_the_choice_beside_them(
    tables: Path, tmp_path: Path
) -> None:
    paper_figures.fig4_placement_sweep(tables, tmp_path)
    drawn = pd.read_csv(tmp_path / "fig4_placement_sweep.csv")
    assert drawn.placement.tolist() == ["v1-4,t1-4", "v2-4,t2-4", "v3-4,t3-4", "v4,t4", "v2-4,t3-4"]
    assert drawn.published.tolist() == [False, True, False, False, False]
    assert drawn.chosen.tolist() == drawn.on_axis.eq(False).tolist()
    assert drawn.hm.tolist() == pytest.approx([55.15, 56.15, 57.15, 58.15, 59.15])
    assert drawn.base_sd.tolist() == pytest.approx([np.std([0.1, 0.2], ddof=1)] * 5)
    svg = (tmp_path / "fig4_placement_sweep.svg").read_text()
    for word in ("published", "chosen", "Harmonic mean"):
        assert word in svg


def test_what_was_chosen_before_is_not_marked_as_chosen(tables: Path, tmp_path: Path) -> None:
    """A run that chooses anew keeps its trainings; the caption says so as the report does."""
    for name in ("scores.csv", "validation.csv"):
        shutil.copy(tables / name, tmp_path / name)
    evidence = {"model": "tiny", "weights": "w"}
    choice = {"vision": [4], "text": [4], "rule": "budget", "evidence": evidence}
    (tmp_path / "choice.json").write_text(json.dumps(choice))
    said = (
        "Of tiny (w) the choice was not trained: v2-4,t3-4 stood for it in the validation, "
        "and it is v4,t4."
    )
    for name in ("fig4_placement_sweep", "fig5_predicted_vs_trained"):
        for folder, proved in ((tables, True), (tmp_path, False)):
            paper_figures.FIGURES[name](folder, tmp_path)
            drawn = pd.read_csv(tmp_path / f"{name}.csv")
            chosen = ["v2-4,t3-4"] if proved else []
            assert drawn.placement[drawn.chosen].tolist() == chosen, name
            text = (tmp_path / f"{name}.tex").read_text()
            assert (said in text.splitlines()[4]) != proved, text
            svg = (tmp_path / f"{name}.svg").read_text()
            assert ("chosen" in svg.lower()) == proved


def test_unfinished_runs_do_not_enter_the_sweep() -> None:
    rows = validation_rows()
    hole = (rows.dataset == "a_b") & (rows.seed == 2) & (rows.placement == "v4,t4")
    means = outcomes.placement_means(rows[~hole]).set_index("placement")
    assert (means.runs == 3).all(), "the run with a hole is left out for every placement"
    assert means.hm["v1-4,t1-4"] == pytest.approx(((60.1 + 60.2) / 2 + 50.1) / 2)
    assert means.hm_sd.isna().all(), "one seed has both datasets"
    alone = rows[(rows.seed == 1) & (rows.dataset == "digits") | (rows.placement == "v4,t4")]
    assert (outcomes.placement_means(alone).runs == 1).all()
    scattered = rows[(rows.seed == 1) == (rows.placement == "v4,t4")]
    with pytest.raises(MissingTable, match="finish the sweep"):
        outcomes.placement_means(scattered)
    with pytest.raises(MissingTable, match="validate with the kind 'start'"):
        outcomes.sweep(outcomes.placement_means(rows[rows.kind == "random"]))
    with pytest.raises(UserError, match="names no block"):
        outcomes.start_block("zero-shot")


def test_a_score_without_a_value_counts_as_no_seed(tables: Path, tmp_path: Path) -> None:
    scores = score_rows()
    of = (scores.metric == "dataset_accuracy") & (scores.tower == "vision")
    lost = of & ((scores.position == "2") & (scores.seed > 1) | (scores.position == "3"))
    lost |= of & (scores.position == "4") & (scores.seed == 1)
    scores.loc[lost, ["value", "low", "high"]] = np.nan
    scores.to_csv(tmp_path / "scores.csv", index=False)
    paper_figures.fig1_dataset_recognition(tmp_path, tmp_path)
    drawn = pd.read_csv(tmp_path / "fig1_dataset_recognition.csv")
    read = summaries.curves(scores, "dataset_accuracy")
    for table in (drawn, read):
        found = table[table.tower == "vision"].set_index("position").rename(index=str)
        assert found.loc[list("1234"), "seeds"].tolist() == [3, 1, 0, 2]
        assert found.loc[list("1234"), "n"].tolist() == [40, 40, 0, 40]
        assert found.null.notna().tolist() == found.value.notna().tolist()
        assert np.isfinite(found.drop(index="3")[["low", "high"]]).all(axis=None)
    alone = read.query("tower == 'vision'").set_index("position").loc["2"]
    assert alone.high - alone.low == pytest.approx(0.04), "the interval of the one seed"


def test_captions_of_trainings_name_the_runs_that_are_drawn(tables: Path, tmp_path: Path) -> None:
    shutil.copy(tables / "scores.csv", tmp_path / "scores.csv")
    rows = validation_rows()
    hole = (rows.seed == 2) & (rows.placement == "v4,t4")
    other = validation_rows("another")
    for kept, said in (
        (rows[~hole], "Trained on 2 datasets (digits, a_b), seed 1."),
        (rows[~hole | (rows.dataset == "digits")],
         "Trained on 2 datasets (digits, seeds 1, 2; a_b, seed 1)."),
    ):  # fmt: skip
        beside = f"{said[:-1]}; another w on 2 datasets (digits, a_b), seeds 1, 2."
        beside = beside.replace("Trained on", "Trained: tiny w on")
        for joined, words in ((kept, said), (pd.concat([kept, other]), beside)):
            joined.to_csv(tmp_path / "validation.csv", index=False)
            paper_figures.fig4_placement_sweep(tmp_path, tmp_path)
            text = (tmp_path / "fig4_placement_sweep.tex").read_text()
            assert render.escape_latex(words) in text, text


def test_a_dataset_with_more_seeds_weighs_no_more_than_another() -> None:
    """Each dataset adds a constant, each seed another: the mean and the spread are known."""
    rows = validation_rows()
    more = rows[rows.dataset == "digits"].assign(seed=lambda rows: rows.seed + 2)
    means = outcomes.placement_means(pd.concat([rows, more]))
    even = outcomes.placement_means(rows)
    assert means.hm.tolist() == pytest.approx(even.hm.tolist())
    assert means.hm_sd.tolist() == pytest.approx(even.hm_sd.tolist()), "seeds of both datasets"
    lost = rows.assign(hm=rows.hm.where((rows.seed == 1) | (rows.placement != "v4,t4")))
    assert (outcomes.placement_means(lost).runs == 2).all(), "a run without a value is none"


def test_means_of_the_same_values_in_another_order_are_one() -> None:
    """Of these three the sum differs in its last bit by their order."""
    rows = validation_rows().query("seed == 1 and dataset == 'digits'").head(2)
    values = {1: (75.5, 51.6), 2: (60.8, 75.5), 3: (51.6, 60.8)}
    seeds = [rows.assign(seed=seed, hm=two) for seed, two in values.items()]
    means = outcomes.placement_means(pd.concat(seeds))
    assert means.hm.nunique() == 1 and means.hm[0] == pytest.approx(187.9 / 3)


def test_figure_5_predicts_with_the_scores_of_the_same_model(tables: Path, tmp_path: Path) -> None:
    """Deeper placements score higher on rising curves; trained hm is planted either way round."""
    spans = validation_rows().query("kind.str.contains('start')")
    means = outcomes.placement_means(spans)
    rising = outcomes.predicted_means(score_rows(), means)
    assert rising.tau.unique().tolist() == pytest.approx([1.0])
    assert "p" not in rising, "placements share blocks: validate alone knows what chance is"
    falling = outcomes.predicted_means(score_rows(), means.assign(hm=-means.hm))
    assert falling.tau.unique().tolist() == pytest.approx([-1.0])
    assert rising.short.tolist() == ["2–4", "1–4", "3–4", "4"], "the published one leads"
    scores, images = score_rows(), means.assign(placement="v2-4,t-").iloc[:1]
    first = scores.metric == scores.metric[0]
    scores = scores[(scores.tower == "text") | first].assign(
        metric=scores.metric.where(scores.tower == "text", "effective_rank")
    )
    with pytest.raises(MissingTable, match="say nothing of a tower that was trained"):
        outcomes.predicted_means(scores, images)
    tied = outcomes.predicted_means(score_rows(), means.assign(hm=means.hm.clip(*means.hm[:2])))
    assert tied.tau.unique().tolist() == pytest.approx([3 / np.sqrt(6 * 3)]), "three alike"
    shutil.copy(tables / "scores.csv", tmp_path / "scores.csv")
    validation_rows("another").to_csv(tmp_path / "validation.csv", index=False)
    with pytest.raises(MissingTable, match="no model has both"):
        paper_figures.fig5_predicted_vs_trained(tmp_path, tmp_path)


def test_two_files_of_weights_are_two_models_of_each_figure(tmp_path: Path) -> None:
    """Each is predicted from its own scores, and panels tell them apart."""
    rising, falling = score_rows(), score_rows()
    falling["value"] = np.where(falling.metric == "dataset_accuracy", 0.9 - falling.value, 0.1)
    files = [f"{one}.safetensors" for one in "ab"]
    for number, weights in enumerate(files):
        one = (rising, falling)[number].assign(weights=weights, low=np.nan, high=np.nan)
        one.to_csv(tmp_path / f"scores_{number}.csv", index=False)
        trained = validation_rows().assign(weights=weights)
        trained.to_csv(tmp_path / f"validation_{number}.csv", index=False)
    paper_figures.fig5_predicted_vs_trained(tmp_path, tmp_path / "out")
    drawn = pd.read_csv(tmp_path / "out" / "fig5_predicted_vs_trained.csv")
    assert list(dict.fromkeys(drawn.panel)) == [f"tiny ({one})" for one in files]
    means = outcomes.placement_means(validation_rows())
    for weights, scores in zip(files, (rising, falling)):
        alone = outcomes.predicted_means(scores, means)
        found = drawn[drawn.weights == weights].set_index("placement").predicted
        assert found.to_dict() == pytest.approx(alone.set_index("placement").predicted.to_dict())
    (tmp_path / "validation_1.csv").unlink()
    paper_figures.fig5_predicted_vs_trained(tmp_path, tmp_path / "out")
    drawn = pd.read_csv(tmp_path / "out" / "fig5_predicted_vs_trained.csv")
    assert set(drawn.weights) == {files[0]}, "also where one of them alone was trained"


def test_a_caption_says_that_amounts_were_tuned(tables: Path, tmp_path: Path) -> None:
    shutil.copy(tables / "scores.csv", tmp_path / "scores.csv")
    for comparison in ("given", "tuned"):
        cells = validation_rows().assign(comparison=comparison)
        cells.to_csv(tmp_path / "validation.csv", index=False)
        for name in ("fig4_placement_sweep", "fig5_predicted_vs_trained"):
            paper_figures.FIGURES[name](tmp_path, tmp_path / "out")
            said = (tmp_path / "out" / f"{name}.tex").read_text()
            assert ("seeds 1, 2, each placement at its own tuned amount" in said) == (
                comparison == "tuned"
            )


def test_a_dataset_has_one_colour_in_all_panels_of_a_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = score_rows("other").query("dataset != 'digits'")
    pd.concat([score_rows(), second]).to_csv(tmp_path / "scores.csv", index=False)
    figures = []
    monkeypatch.setattr(paper_figures, "save", lambda figure, *rest: figures.append(figure) or [])
    paper_figures.fig2_gap(tmp_path, tmp_path)
    (figure,) = figures
    (legend,) = figure.legends
    named = {text.get_text(): line.get_color()
             for text, line in zip(legend.get_texts(), legend.legend_handles)}  # fmt: skip
    lines = [line for ax in figure.axes for line in ax.lines]
    assert [line.get_label() for line in lines].count("a_b") == 4
    assert all(line.get_color() == named[line.get_label()] for line in lines)


def test_figure_5_compares_scores_and_trainings_of_the_same_weights(
    tables: Path, tmp_path: Path
) -> None:
    """Two checkpoints of one name are told apart by the hashes beside the tables."""
    for name in ("scores.csv", "validation.csv"):
        shutil.copy(tables / name, tmp_path / name)
    model = {"model": {"weights_hash": "a" * 64}}
    (tmp_path / "provenance.json").write_text(json.dumps(model))
    for trained, refused in (("a" * 64, False), ("a" * 12 + "b" * 52, False), ("b" * 64, True)):
        (tmp_path / "validation.json").write_text(json.dumps({"weights_hash": trained}))
        (outcome,) = draw_all(tmp_path, tmp_path, ["fig5_predicted_vs_trained"])
        assert bool(outcome.paths) is not refused
    for said in ("weights_hash=bbbbbbbbbbbb", "scores with weights_hash=aaaaaaaaaaaa", "score the"):
        assert said in outcome.reason
    assert draw_all(tmp_path, tmp_path, ["fig4_placement_sweep"])[0].paths, "compares no scores"


def test_figure_5_says_that_equal_outcomes_have_no_rank_correlation(
    tables: Path, tmp_path: Path
) -> None:
    shutil.copy(tables / "scores.csv", tmp_path / "scores.csv")
    for outcome, said in ((None, "Kendall's τ = 0."), (60.0, "no Kendall's τ, as all are")):
        rows = validation_rows()
        rows = rows if outcome is None else rows.assign(base=outcome, novel=outcome, hm=outcome)
        rows.to_csv(tmp_path / "validation.csv", index=False)
        paper_figures.fig5_predicted_vs_trained(tmp_path, tmp_path)
        svg = (tmp_path / "fig5_predicted_vs_trained.svg").read_text()
        assert said in svg and "nan" not in svg, said


def test_figure_6_reads_recorded_cost_or_the_validation(tables: Path, tmp_path: Path) -> None:
    paper_figures.fig6_cost(tables, tmp_path)
    drawn = pd.read_csv(tmp_path / "fig6_cost.csv")
    assert drawn.parameters.tolist() == [6000, 5000, 4000, 3000]
    assert "seconds" not in drawn, "placements that trained side by side share one time"
    groups = validation_rows().assign(seconds=lambda rows: 9.0 + (rows.placement == "v4,t4"))
    assert "seconds" not in paper_figures.cost_points(groups), "and so do those of two groups"
    apart = validation_rows().assign(seconds=lambda rows: rows.parameters / 100.0)
    assert paper_figures.cost_points(apart).seconds.tolist() == [60, 50, 40, 30]
    cost = pd.DataFrame({"model": "ViT-B-16", "placement": ["v9-12,t9-12", "v5-12,t5-12"],
                         "parameters": [337_280, 674_560], "memory_mib": [2048, 4096]})  # fmt: skip
    cost.to_csv(tmp_path / "cost.csv", index=False)
    paper_figures.fig6_cost([tables, tmp_path], tmp_path / "out")
    drawn = pd.read_csv(tmp_path / "out" / "fig6_cost.csv")
    assert drawn.start.tolist() == [5, 9]
    svg = (tmp_path / "out" / "fig6_cost.svg").read_text()
    assert "Memory (GiB)" in svg
    assert "Step (ms)" not in svg


def drawn_texts(figure: Figure) -> list[Text]:
    """Texts that appear on the page; ticks beyond the limits of their axis do not."""
    hidden = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not low <= tick.get_loc() <= high or not tick.label1.get_visible():
                    hidden |= {tick.label1, tick.label2}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text not in hidden]
    return [text for text in found if text.get_text().strip()]


@pytest.mark.parametrize("name", sorted(paper_figures.FIGURES))
def test_figures_are_one_column_wide_and_legible(
    name: str, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Width, font sizes, and no text that covers another or leaves the page."""
    seen = []
    monkeypatch.setattr(paper_figures, "save", lambda figure, *_: seen.append(figure) or [])
    paper_figures.FIGURES[name](tables, tmp_path)
    figure = seen[0]
    assert figure.get_figwidth() == pytest.approx(3.35)
    figure.draw_without_rendering()
    boxes = []
    for text in drawn_texts(figure):
        assert text.get_fontsize() >= 5.5, text.get_text()
        box = text.get_window_extent()
        if box.width == 0:
            continue
        assert box.x0 > -1, text.get_text()
        assert box.x1 < figure.bbox.width + 1, text.get_text()
        assert box.y0 > -1, text.get_text()
        assert box.y1 < figure.bbox.height + 1, text.get_text()
        for other, words in boxes:
            covered = box.padded(-1)
            assert not covered.overlaps(other), f"{text.get_text()!r} covers {words!r}"
        boxes.append((box.padded(-1), text.get_text()))


@pytest.mark.parametrize("name", sorted(paper_figures.FIGURES))
def test_long_names_many_datasets_and_deep_towers_stay_on_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models whose names differ at the end alone, 27 datasets, a sweep of 40 blocks."""
    long = "_a_$model$_of_a_name_of_more_than_sixty_characters_without_a_space"
    scores, cells = score_rows(long), validation_rows(long)
    gaps = scores[scores.dataset == "digits"]
    scores = pd.concat([scores, *(gaps.assign(dataset=f"{long}_{k}") for k in range(25))])
    first = cells[cells.placement == "v1-4,t1-4"].assign(kind="start")
    cells = pd.concat([first.assign(placement=f"v{k}-40,t{k}-40") for k in range(1, 40)])
    if name == "fig5_predicted_vs_trained":
        cells = validation_rows(long)
    for weights in ("w", "random"):
        scores.assign(weights=weights).to_parquet(tmp_path / f"scores_{weights}.parquet")
        cells.assign(weights=weights).to_csv(tmp_path / f"validation_{weights}.csv", index=False)
    seen: list[Figure] = []
    monkeypatch.setattr(paper_figures, "save", lambda figure, *_: seen.append(figure) or [])
    paper_figures.FIGURES[name](tmp_path, tmp_path)
    figure = seen[0]
    figure.draw_without_rendering()
    boxes = [(one.get_window_extent(), one.get_text()) for one in drawn_texts(figure)]
    below = any(words.endswith("\n ") for _, words in boxes)  # a line of their own
    boxes = [one for one in boxes if not (below and one[1] == "random weights")]
    for number, (box, words) in enumerate(boxes):
        assert box.x0 > -1 and box.x1 < figure.bbox.width + 1, words
        for other, covered in boxes[number + 1 :]:
            assert not box.padded(-1).overlaps(other.padded(-1)), f"{words!r} covers {covered!r}"
    assert sum("(random)" in words.replace("\n", "") for _, words in boxes) >= 1
    assert min(ax.get_window_extent().height for ax in figure.axes) / figure.dpi > 0.4


@pytest.mark.parametrize("name", ["fig1_dataset_recognition", "fig5_predicted_vs_trained"])
def test_nothing_of_a_saved_figure_is_cut_at_its_edge(
    name: str, published: Path, tmp_path: Path
) -> None:
    """Of recorded runs, whose titles are longer; as saved, where the layout is not that before."""
    paper_figures.FIGURES[name](published, tmp_path)
    with Image.open(tmp_path / f"{name}.png") as image:
        pixels = np.asarray(image.convert("L"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def test_the_command_draws_the_paper_from_run_folders(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from vlmlayers.cli import app

    some = {name: DRAWINGS[name] for name in ("fig1_dataset_recognition", "table4_averages")}
    monkeypatch.setattr(vlmlayers.figures, "DRAWINGS", some)
    other = tmp_path / "other"
    other.mkdir()
    score_rows("second").to_parquet(other / "scores.parquet")
    out = tmp_path / "paper"
    run = CliRunner().invoke(app, ["figures", str(tables), str(other), "--paper", str(out)])
    assert run.exit_code == 0, run.output
    assert run.output.count("\n") == len(some)
    assert "fig1_dataset_recognition     svg png pdf csv" in run.output
    panels = pd.read_csv(out / "fig1_dataset_recognition.csv").panel.unique().tolist()
    assert panels == ["tiny (w)", "second (w)"]
    with pytest.raises(UserError, match="nowhere is not a folder"):
        draw_all(tmp_path / "nowhere", out)
