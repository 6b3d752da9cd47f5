"""The estimate: measured constants, arithmetic that holds, and the true size of a store."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from vlmlayers.errors import UserError
from vlmlayers.metrics.moments import ClassMoments, CrossMoments, Moments
from vlmlayers.models import extract, stream
from vlmlayers.models.estimate import Costs, estimate, measure_costs, stream_bytes
from vlmlayers.models.recording import Recorder
from vlmlayers.models.work import bytes_per_item
from vlmlayers.scores.sums import StreamingScores

module = sys.modules[measure_costs.__module__]
COSTS = Costs(
    forward=0.002,
    decode=0.008,
    bytes_per_image=1000,
    stream_bytes=5_000_000,
    device="cpu",
    batch_size=4,
)


def test_time_adds_up_without_workers_and_overlaps_with_them():
    assert COSTS.seconds(1000) == pytest.approx(10)
    assert COSTS.seconds(1000, workers=2) == pytest.approx(4)
    assert COSTS.seconds(1000, workers=8) == pytest.approx(2)
    slow = replace(COSTS, write=0.003, add=0.002)
    assert slow.seconds(1000, workers=8) == pytest.approx(3), "the disk"
    assert slow.seconds(1000, workers=8, streaming=True) == pytest.approx(4)


def test_accumulators_take_the_bytes_that_are_foretold():
    manifest = tiny.DrawnManifest(count=250, captioned=False)
    model, items = tiny.model(), manifest.items("train")
    costs = measure_costs(model, manifest, items, batch_size=8)
    sums = stream(model, manifest, "train", batch_size=8, progress=False)
    (kept,) = sums.datasets.values()
    parts = [(m.scatter,) for m in kept.moments.values()]
    parts += [(c.cross,) for c in kept.cross.values()]
    parts += [(c.means,) for c in kept.classes.values()]
    parts += [(rows,) for rows in kept.sample.values()]
    assert sum(array.nbytes for part in parts for array in part) == pytest.approx(
        costs.stream_bytes, rel=0.02
    )


def test_bytes_per_image_are_those_of_a_real_store(tmp_path):
    model, manifest = tiny.model(), tiny.DrawnManifest()
    items = manifest.items("train")
    costs = measure_costs(model, manifest, items, batch_size=8)
    extract(model, manifest, "train", out=tmp_path / "s", batch_size=8, progress=False)
    files = list((tmp_path / "s" / "vision").glob("*/*.npy"))
    assert sum(f.stat().st_size - 128 for f in files) == len(items) * costs.bytes_per_image
    assert costs.forward > 0
    assert costs.decode > 0


def test_captions_count_with_their_images(tmp_path):
    model, manifest = tiny.model(), tiny.DrawnManifest()
    items = manifest.items("train")
    plain = measure_costs(model, manifest, items, batch_size=8)
    told = measure_costs(model, manifest, items, batch_size=8, captions=True)
    stored = extract(model, manifest, "train", text="captions", progress=False)
    sizes = [
        array.nbytes
        for tower in stored.towers
        for by_position in tower.arrays.values()
        for array in by_position.values()
    ]
    assert told.bytes_per_image * len(items) == sum(sizes)
    assert told.bytes_per_image > plain.bytes_per_image


def test_the_text_names_the_plan(tmp_path):
    manifest = tiny.DrawnManifest()
    planned = [(manifest, manifest.items("train"))]
    text = estimate(tiny.model(), planned, out=tmp_path / "a" / "b")
    assert "tiny clip in one process on cpu, batches of 22" in text
    assert re.search(r"^ *drawn +22 ", text, re.MULTILINE)
    assert not re.search(r"^ *all ", text, re.MULTILINE)
    assert "free on this disk" in text
    with pytest.raises(UserError, match="nothing to estimate"):
        estimate(tiny.model(), [(manifest, [])])
    with pytest.raises(UserError, match="planned takes pairs of a manifest and its items"):
        estimate(tiny.model(), "faces")
    with pytest.raises(UserError, match="planned names no dataset"):
        estimate(tiny.model(), [])


class Clock:
    """A stopped clock: known work takes a known time, and the first of its kind far more."""

    def __init__(self):
        self.now = 0.0
        self.begun = {"pairs"}  # which the estimate does not time

    def spend(self, kind, seconds):
        self.now += seconds if kind in self.begun else 100 * seconds
        self.begun.add(kind)

    def charge(self, monkeypatch, owner, name, cost):
        """Have each call of a function take what `cost` says of what it is given and returns."""
        real = getattr(owner, name)

        def charged(*given):
            made = real(*given)
            self.spend(*cost(made, *given))
            return made

        monkeypatch.setattr(owner, name, charged)


@pytest.mark.parametrize("captions", [False, True])
def test_what_is_foretold_is_what_known_work_takes(monkeypatch, tmp_path, captions):
    """Two captions an image; forward and decode by image, sums by numbers, disk by bytes."""
    clock, model, manifest = Clock(), tiny.model(), tiny.DrawnManifest(count=30)
    for tower, each in (("vision", 0.001), ("text", 0.003)):
        clock.charge(
            monkeypatch,
            model.towers[tower],
            "run",
            lambda made, x, t=tower, s=each: (t, s * len(x)),
        )
    opened = manifest.open_image

    def open_image(*given, **where):
        clock.now += 0.007
        return opened(*given, **where)

    manifest.open_image = open_image
    written = []
    temporary = tempfile.TemporaryFile
    monkeypatch.setattr(
        module.tempfile, "TemporaryFile",
        lambda **where: written.append(where["dir"]) or temporary(**where),
    )  # fmt: skip
    monkeypatch.setattr(
        module.os, "fsync",
        lambda handle: clock.spend("disk", 1e-8 * os.fstat(handle).st_size),
    )  # fmt: skip
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)

    def per_number(rows, *widths):
        return len(rows) * math.prod(widths) * 1e-9

    clock.charge(
        monkeypatch, Moments, "of",
        lambda made, x: ("moments", per_number(x, x.shape[1], x.shape[1])),
    )  # fmt: skip
    clock.charge(
        monkeypatch, CrossMoments, "of",
        lambda made, x, y: ("pairs", per_number(x, x.shape[1], y.shape[1])),
    )  # fmt: skip
    clock.charge(
        monkeypatch, ClassMoments, "of",
        lambda made, x, labels, classes: ("means", per_number(x, x.shape[1])),
    )  # fmt: skip
    items = manifest.items("train")
    found = measure_costs(
        model, manifest, items, batch_size=8, captions=captions, disk=tmp_path
    )  # fmt: skip
    assert set(written) == {tmp_path}
    assert found.forward == pytest.approx(0.001 + 2 * 0.003 * captions)
    assert found.decode == pytest.approx(0.007)
    assert found.write == pytest.approx(1e-8 * found.bytes_per_image)
    features = extract(
        model, manifest, "train", text="captions" if captions else "prompts", progress=False
    )
    sums = StreamingScores()
    sums.update(features)
    (kept,) = sums.datasets.values()
    began = clock.now
    kept.absorb(kept.sample, kept.labels)  # counts what a stream adds of items beyond its sample
    assert found.add == pytest.approx((clock.now - began) / len(items))

    def columns(**more):
        text = estimate(
            model, [(manifest, items)], batch_size=8, captions=captions, out=tmp_path, **more
        )
        names, row = text.splitlines()[5:7]
        return dict(zip(names.split(), row.split()))

    told = columns(workers=0)
    assert float(told["encode"]) == pytest.approx(1e3 * found.forward, abs=0.01)
    assert float(told["decode"]) == pytest.approx(7, abs=0.01)
    assert float(told["write"]) == pytest.approx(1e3 * found.write, abs=0.001)
    assert float(told["add"]) == pytest.approx(1e3 * found.add, abs=0.001)
    assert float(told["stream_mb"]) == pytest.approx(found.stream_bytes / 1e6, abs=0.1)


def test_hours_and_gigabytes_are_those_of_all_images(monkeypatch):
    costs = replace(COSTS, bytes_per_image=2_000_000, forward=3.6, decode=7.2, add=0.9)
    monkeypatch.setattr(module, "measure_costs", lambda *given, **options: costs)
    for workers, hours, streamed in ((0, "6.000", "6.500"), (4, "2.000", "2.500")):
        text = estimate(
            tiny.model(), [(tiny.DrawnManifest(name="a" * 19), range(2000))], workers=workers
        )
        names, row = text.splitlines()[5:7]
        told = dict(zip(names.split(), row.split()))
        assert (told["store_h"], told["store_gb"]) == (hours, "4.000")
        assert told["stream_h"] == streamed
        assert told["dataset"] == "a" * 17 + "…" and "free on this disk" not in text
    whole = estimate(tiny.model(), [(tiny.DrawnManifest(name="a" * 18), [0])])
    assert whole.splitlines()[6].split()[0] == "a" * 18


def test_several_datasets_are_added_up():
    manifests = [tiny.DrawnManifest(name="one"), tiny.DrawnManifest(name="two")]
    text = estimate(tiny.model(), [(made, made.items("train")) for made in manifests])
    assert re.search(r"^ *one +22 .*\n *two +22 .*\n *all +44 ", text, re.MULTILINE)
    *_, one, two, both = text.splitlines()
    assert float(both.split()[-1]) == pytest.approx(
        float(one.split()[-1]) + float(two.split()[-1]), abs=0.11
    )
    assert max(map(len, text.splitlines())) <= 80


def test_the_command_line_estimates_and_records_nothing(tmp_path):
    from typer.testing import CliRunner

    from vlmlayers.cli import app

    config = tiny.config(text={"vocab_size": 49408})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(
        app,
        [
            "extract",
            str(tmp_path / "model"),
            "digits",
            "--random-weights",
            "--items",
            "20",
            "--out",
            str(tmp_path / "run"),
            "--estimate",
        ],
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"^ *digits +20 ", result.output, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def shapes(blocks, width, joint):
    """Return the shapes of a tower's rows by space and position, as a recorder has them."""
    positions = ["embed", *map(str, range(1, blocks + 1))]
    return {
        "native": dict.fromkeys([*positions, "final"], (width,)) | {"proj": (joint,)},
        "joint": dict.fromkeys([*positions, "proj"], (joint,)),
    }


def test_the_table_of_the_documentation_is_what_the_code_foretells():
    made = tiny.model()
    for tower in made.towers.values():
        shape = (tower.depth, 8, 4)
        assert {s: list(by) for s, by in shapes(*shape).items()} == {
            s: list(by) for s, by in Recorder(tower, ("native", "joint"), None).shapes().items()
        }
    page = Path(__file__).parents[3] / "docs" / "scale.md"
    rows = [
        [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(r"\| *\d+ × \d+ *\|", line)  # blocks × width; other tables have other products
    ]
    assert len(rows) == 5
    for model, vision, text, joint, size, *sizes, captions, prompts in rows:
        image, words = (
            shapes(*map(int, tower.split(" × ")), int(joint)) for tower in (vision, text)
        )
        assert bytes_per_item(image) == int(size), model
        for shown, count in zip(sizes, (1e5, 1e6, 1e7), strict=True):
            assert float(shown) == pytest.approx(int(size) * count / 1e9, rel=0.011), model
        for kept, paired in ((captions, True), (prompts, False)):
            foretold = stream_bytes(image, words, 1000, captions=paired)
            assert int(kept) == round(foretold / 1e6), model
