"""Run the registered study of search, cell by cell, and say what survives correction.

`python benchmarks/registered_search.py run DATASET… --model mini-clip --method mma` trains what is
missing of the cells dataset × seed and goes on where it was stopped; `… analyse` reads the cells of
all commands, or a table of cells such as the recorded one. A dataset is a name, a manifest or an
image folder. What is asked, compared and corrected is fixed in `benchmarks/registered_search.md`,
which was written first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from vlmlayers.errors import UserError
from vlmlayers.files import atomically
from vlmlayers.manifests import Manifest
from vlmlayers.placement import Placement
from vlmlayers.words import markdown_table

HERE = Path(__file__).resolve().parent
CLASSES, TRAIN, TEST, SHOTS, FOLDS, BUDGET = 10, 24, 20, 16, 4, 12.0
COMPARED = {"paper": "published placement", "all": "all blocks", "last": "last block",
            "zero_shot": "zero-shot CLIP"}  # fmt: skip
DRAW = 0xA7  # key of the draw of classes
RESULT = ("method", "against", "difference", "low", "high", "p", "units", "cells")


def redraw(manifest: Manifest, seed: int, out: Path, root: Path | None, classes: int) -> Manifest:
    """Write a dataset's subset with other classes as base and novel, and return its manifest.

    Of each class at most `TRAIN` and `TEST` images are taken. One without a test split deals its
    images to both in turn.
    """
    folder = out / f"{manifest.name}-{seed}"
    if (folder / "manifest.toml").exists():
        return Manifest.load(folder / "manifest.toml")
    generator = np.random.default_rng([DRAW, seed])
    names = manifest.class_names(root)
    drawn = generator.permutation(len(names))[:classes]
    apart = "test" in manifest.splits(root)
    items = {
        split: manifest.items(split, root) for split in (("train", "test") if apart else ("all",))
    }
    rows = []
    for label, old in enumerate(drawn):
        own = {split: [one for one in some if one.label == old] for split, some in items.items()}
        dealt = {
            split: [some[i] for i in generator.permutation(len(some))]
            for split, some in own.items()
        }
        if not apart:
            dealt = {"train": dealt["all"][::2], "test": dealt["all"][1::2]}
        for split, most in (("train", TRAIN), ("test", TEST)):
            for number, item in enumerate(dealt[split][:most]):
                path = folder / "images" / f"{split}-{label}-{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                manifest.open_image(item, root).save(path)
                rows.append((path.name, label, names[old], split))
    table = pd.DataFrame(rows, columns=["path", "label", "class_name", "split"])
    table.to_csv(folder / "items.csv", index=False)
    text = (
        f'title = "{manifest.name}, draw {seed}"\nkind = "{manifest.spec.kind}"\nfolder = "."\n'
        f'images = "images"\nlayout = "table"\nsplit_file = "items.csv"\nclasses = {len(drawn)}\n'
    )
    atomically(folder / "manifest.toml", lambda part: part.write_text(text, encoding="utf-8"))
    return Manifest.load(folder / "manifest.toml")


def cell(model: Any, method: str, manifest: Manifest, seed: int, out: Path) -> dict[str, Any]:
    """Return what search and its rivals reach in one cell, each at its own amount."""
    import vlmadapters as va
    from vlmadapters.training.recipes import load_recipe

    depths = {name: tower.depth for name, tower in model.towers.items()}
    recipe = load_recipe("mini", method, depths).changed({"shots": SHOTS}, {})
    common: dict[str, Any] = {"recipe": recipe, "out": out, "seeds": (seed,), "progress": False}
    began = time.process_time()
    found = va.search(model, [manifest], method, budget=BUDGET, folds=FOLDS, **common)
    published = Placement(recipe.method.vision, recipe.method.text)
    rivals = va.validate(model, published, [manifest], kinds=("paper", "all", "last"), **common)
    table = rivals.table[rivals.table["comparison"] == "tuned"]
    plain = table.iloc[0]
    base, novel = plain["zero_shot_base"], plain["zero_shot_novel"]
    reached = {"zero_shot": 2 * base * novel / (base + novel) if base + novel else 0.0}
    for kind in ("paper", "all", "last"):
        rows = table[[kind in one.split("+") for one in table["kind"]]]
        reached[kind] = float(rows["hm"].iloc[0]) if len(rows) else np.nan
    reached["search"] = reached["zero_shot"]
    if found.placement or found.placement.amount:
        trained = va.train(model, [manifest], [recipe], out / "pick", seeds=[seed], progress=False,
                           placement=[str(found.placement)])  # fmt: skip
        own = trained[trained["seed"] == seed].set_index("split_kind")["accuracy"]
        total = own["base"] + own["novel"]
        reached["search"] = 200 * own["base"] * own["novel"] / total if total else 0.0
    return {
        "model": model.name, "method": method, "dataset": manifest.name.rpartition("-")[0],
        "seed": seed, "pick": found.summary["pick"], "decided": found.decided,
        "trainings": found.summary["cost"]["trainings"], **reached,
        "n": int(plain["n_base"] + plain["n_novel"]),
        "seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def run(asked: argparse.Namespace) -> None:
    """Run the missing cells of some datasets."""
    from vlmlayers.models import load_model

    model = None
    name = Path(asked.model).name
    for seed in asked.seeds:  # a stopped study then has whole rounds over the datasets
        for dataset in asked.datasets:
            source = Manifest.load(dataset)
            file = asked.out / "cells" / f"{name}-{asked.method}-{source.name}-{seed}.csv"
            if file.exists():
                continue
            model = model or load_model(asked.model)
            drawn = redraw(source, seed, asked.out / "data", asked.data_root, asked.classes)
            work = asked.out / "work" / file.stem
            row = pd.DataFrame([cell(model, asked.method, drawn, seed, work)]).assign(model=name)
            file.parent.mkdir(parents=True, exist_ok=True)
            atomically(file, partial(row.to_csv, index=False))
            print(row.to_string(index=False, header=False))


def analyse(cells: pd.DataFrame) -> pd.DataFrame:
    """Return search minus each rival, by method: mean, interval, p and p by Holm, n.

    The unit is dataset × backbone: the mean over its seeds. Interval and p are those of a t-test
    over units; all comparisons of all methods are corrected together.

    Args:
        cells: One row per cell, as `run` writes them.
    """
    from vlmadapters.validation.ranking import holm

    rows = []
    for method, part in cells.groupby("method", sort=False):
        for rival, words in COMPARED.items():
            gain = (part["search"] - part[rival]).groupby([part["dataset"], part["model"]]).mean()
            gain = gain.dropna()
            units = len(gain)
            if units < 2:
                continue
            mean, error = float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(units))
            half = float(stats.t.ppf(0.975, units - 1)) * error
            # Equal in every unit: nothing to tell apart.
            p = 2 * float(stats.t.sf(abs(mean) / error, units - 1)) if error > 0 else 1.0
            values = (method, words, mean, mean - half, mean + half, p, units, len(part))
            rows.append(dict(zip(RESULT, values)))
    if not rows:
        raise UserError("too few cells to analyse; run two datasets or more")
    found = pd.DataFrame(rows)
    found["p_holm"] = holm(found["p"].to_numpy(np.float64))
    found["survives"] = found["p_holm"] < 0.05
    return found


def report(source: Path, method: str | None = None) -> str:
    """Return what the cells of a folder, or of one table, say, as Markdown.

    Args:
        source: The folder or the table.
        method: The method whose comparisons are corrected by themselves; None takes all together.
    """
    files = [source] if source.is_file() else sorted((source / "cells").glob("*.csv"))
    if not files:
        raise UserError(f"{source.resolve()} holds no cells; run the study first")
    cells = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    if method is not None:
        cells = cells[cells["method"] == method]
    found = analyse(cells)
    rows = [
        (row["method"], row["against"],
         f"{row['difference']:+.1f} [{row['low']:.1f}, {row['high']:.1f}]", f"{row['p']:.3f}",
         f"{row['p_holm']:.3f}", "yes" if row["survives"] else "no",
         f"{row['units']} units, {row['cells']} cells")
        for row in found.to_dict("records")
    ]  # fmt: skip
    headings = ("method", "search against", "points of HM", "p", "p, Holm", "survives", "n")
    means = cells.groupby("method")[["search", *COMPARED]].mean().round(1).reset_index()
    survived = int(found["survives"].sum())
    return "\n".join([
        f"{survived} of {len(found)} comparisons survive correction (null 0; level 0.05). "
        f"Search could tell its pick from the default in {int(cells['decided'].sum())} of "
        f"{len(cells)} cells; {cells['seconds'].sum() / 3600:.2f} hours of one core.", "",
        markdown_table(headings, rows), "",
        markdown_table(tuple(means.columns), means.astype(str).to_numpy().tolist()),
    ])  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Run or analyse; leave with code 2 and one line where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "registered_search")
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run")
    running.add_argument("datasets", nargs="+")
    running.add_argument("--model", default="mini-clip")
    running.add_argument("--method", default="mma")
    running.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    running.add_argument("--classes", type=int, default=CLASSES)
    running.add_argument("--data-root", type=Path, default=None)
    reading = verbs.add_parser("analyse")
    reading.add_argument("cells", type=Path, nargs="?", help="a table; else those of --out")
    reading.add_argument("--method", help="one method, a family of its own; else all together")
    asked = parser.parse_args(words)
    try:
        if asked.verb == "run":
            run(asked)
        else:
            print(report(asked.cells or asked.out, asked.method))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
