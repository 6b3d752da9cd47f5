"""The estimate: measured constants, arithmetic that holds, and the true size of a store."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from vlmlayers.errors import UserError
from vlmlayers.models import extract, stream
from vlmlayers.models.estimate import (
    Costs,
    bytes_per_image,
    estimate,
    measure_costs,
    stream_bytes,
)
from vlmlayers.models.recording import Recorder

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
        assert bytes_per_image(image) == int(size), model
        for shown, count in zip(sizes, (1e5, 1e6, 1e7), strict=True):
            assert float(shown) == pytest.approx(int(size) * count / 1e9, rel=0.011), model
        for kept, paired in ((captions, True), (prompts, False)):
            foretold = stream_bytes(image, words, 1000, captions=paired)
            assert int(kept) == round(foretold / 1e6), model
