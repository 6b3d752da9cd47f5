"""Do a piece of work that is killed again and again; run as a process of its own.

    python lab.py extract|stream|train|validate|search FOLDER [--kills 20] [--seed 0] [--signal 9]

A start of Python costs seconds, so each attempt is a fork of this warm process. It gets a signal
at a random moment of the time that the work takes undisturbed, and the next attempt goes on in the
same folder. An attempt that finishes first counts as no kill; its result is compared and the
folder emptied. The last line is JSON: kills, rounds that finished, and at how many of the kills
the folder held unfinished work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
for name in ("vlmlayers", "vlmadapters"):
    sys.path.append(str(HERE.parent / name))

import pandas as pd  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from backbones import shared_backbone  # noqa: E402
from PIL import Image  # noqa: E402

from vlmadapters.clip.products import adopt_products  # noqa: E402
from vlmadapters.methods.mma.config import MMAConfig  # noqa: E402
from vlmadapters.protocols.train import base_to_novel  # noqa: E402
from vlmadapters.training.recipes import Recipe, TrainConfig  # noqa: E402
from vlmadapters.validation.search import search  # noqa: E402
from vlmadapters.validation.validate import validate  # noqa: E402
from vlmlayers.manifests import Manifest  # noqa: E402
from vlmlayers.models import extract, stream  # noqa: E402
from vlmlayers.scores.streamed import streamed_scores  # noqa: E402
from vlmlayers.selection import LayerChoice  # noqa: E402

RECIPE = Recipe(
    "lab",
    TrainConfig(lr=0.05, epochs=3, batch_size=4, shots=3, save_every=1),
    MMAConfig.span(2, 3, dim=4, scale=0.5),
)


class Slow(tiny.DrawnManifest):
    """Each image takes a while, so that there is time to be killed in."""

    def open_image(self, item, root=None, size=None):
        time.sleep(0.004)
        return super().open_image(item, root, size)


def run_extract(folder: Path) -> None:
    options = {"batch_size": 4, "text": "captions", "progress": False}
    extract(tiny.model(), Slow(count=150), "train", out=folder / "store", **options)


def run_stream(folder: Path) -> None:
    options = {"batch_size": 4, "sample": 20, "save_seconds": 0.0, "progress": False}
    model = tiny.model()
    found = stream(model, Slow(count=150), "train", out=folder / "sums", **options)
    table = streamed_scores(found)
    shutil.rmtree(folder / "sums")
    table.round(9).to_csv(folder / "scores.csv", index=False)


def colours(folder: Path) -> Manifest:
    """Return a dataset of four colours, drawn where it is not there yet."""
    for split, count in (("train", 4), ("test", 6)):
        for number, name in enumerate(("red", "green", "blue", "gray")):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                colour = tuple(255 if c == number else 40 + 30 * i for c in range(3))
                Image.new("RGB", (32, 32), colour).save(place / f"{i}.png")
    return Manifest.load(folder)


def run_train(folder: Path) -> None:
    base_to_novel(
        shared_backbone(),
        [str(folder.parent / "colours")],
        RECIPE,
        folder,
        configs=[RECIPE.method, MMAConfig.span(3, 3, dim=4, scale=0.5)],
        seeds=(1, 2),
        save_adapters=True,
        progress=False,
    )


def run_validate(folder: Path) -> None:
    validate(
        shared_backbone(),
        LayerChoice((2, 3), (2, 3), "explicit"),
        [Manifest.load(folder.parent / "colours")],
        kinds=("all", "vision"),
        amount="given",
        seeds=(1, 2),
        recipe=RECIPE,
        out=folder,
        progress=False,
    )


def run_search(folder: Path) -> None:
    search(
        shared_backbone(),
        [folder.parent / "colours"],
        placement=["3"],
        amounts=["scale=0.3"],
        folds=3,
        novel=False,
        recipe=RECIPE,
        out=folder,
        progress=False,
    )


WORK: dict[str, Callable[[Path], None]] = {
    "extract": run_extract,
    "stream": run_stream,
    "train": run_train,
    "validate": run_validate,
    "search": run_search,
}
TABLES = ("results.csv", "search.csv", "validation.csv", "validation_placements.csv")


def content(folder: Path) -> dict[str, bytes]:
    """Return what a finished run leaves: tables without how long it took, stores, adapters."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.name in TABLES:
            table = pd.read_csv(path, keep_default_na=False, dtype=str)
            kept = table.drop(columns="seconds", errors="ignore")
            found[name] = kept.to_csv(index=False).encode()
        elif path.name == "search.json":
            summary = json.loads(path.read_text())
            del summary["cost"]["seconds"], summary["environment"]  # what was timed, and when
            found[name] = json.dumps(summary).encode()
        elif path.suffix in (".npy", ".safetensors") or name.startswith(("store/", "scores")):
            found[name] = path.read_bytes()
    left = [str(p.relative_to(folder)) for p in (folder / "unfinished").glob("*/*")]
    found["left over"] = json.dumps(sorted(left)).encode()
    return found


def attempt(work: Callable[[Path], None], folder: Path) -> int:
    """Start the work in a fork; return its process number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(folder)
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORK)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", type=int, default=int(signal.SIGKILL))
    given = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts deaf to it
    colours(given.folder / "colours")
    work, random_ = WORK[given.work], random.Random(given.seed)

    def fresh(name: str) -> Path:
        folder = given.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def finish(folder: Path) -> float:
        began = time.monotonic()
        code = os.waitstatus_to_exitcode(os.waitpid(attempt(work, folder), 0)[1])
        assert code == 0, f"an undisturbed start ended with {code}"
        return time.monotonic() - began

    undisturbed = fresh("undisturbed")
    duration = finish(undisturbed)
    expected = content(undisturbed)
    # Which library multiplies is timed, and may be another on a busy machine, where it rounds in
    # another way; what goes on takes over that of what it goes on with.
    for cell in undisturbed.rglob("cells/*.json"):
        adopt_products(json.loads(cell.read_text())["products"])
    folder, kills, rounds, midway = fresh("killed"), 0, 0, 0
    while kills < given.kills:
        child = attempt(work, folder)
        time.sleep(random_.random() * 0.7 * duration)
        os.kill(child, given.signal)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            rounds += 1
            assert content(folder) == expected, _difference(content(folder), expected)
            folder = fresh("killed")
            continue
        assert code in (-given.signal, 130), f"the start ended with {code}"
        kills += 1
        midway += any(folder.rglob("*"))
    finish(folder)
    assert content(folder) == expected, _difference(content(folder), expected)
    files = len(expected) - 1
    summary = {"kills": kills, "finished": rounds + 1, "midway": midway, "files": files}
    sys.stdout.write(json.dumps({**summary, "seconds": round(duration, 2)}) + "\n")


def _difference(one: dict[str, bytes], other: dict[str, bytes]) -> str:
    names = sorted(one.keys() | other.keys())
    return (
        f"differing: {[n for n in names if one.get(n) != other.get(n)]}, left {one['left over']!r}"
    )


if __name__ == "__main__":
    main()
