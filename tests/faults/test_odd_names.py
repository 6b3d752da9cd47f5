"""Class names that no one should use, all the way from the images to a page in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from browser import CHROMIUM, chromium
from data_fixtures import picture

from vlmlayers.manifests.items import Item
from vlmlayers.models import extract
from vlmlayers.report import write_report
from vlmlayers.scores import score
from vlmlayers.study import check_study, run_study

NAMES = (
    "</script><script>alert(1)</script>", "<img src=http://example.invalid/x onerror=alert(2)>",
    "{0.__class__} {} {name} %s", "two\nlines\tand a tab", "שלום \u202eevil\u2066", "🦊" * 30,
    "x" * 10_000, "=HYPERLINK(\"http://example.invalid\")",
)  # fmt: skip


def dataset(folder: Path, title: str) -> Path:
    rows = []
    for number in range(10 * len(NAMES)):
        path = f"{number}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture(number, (32, 32)).save(folder / path)
        label = number % len(NAMES)
        row = {"path": path, "label": label, "class_name": NAMES[label], "split": "train"}
        rows.append(json.dumps(row))
    (folder / "items.jsonl").write_text("\n".join(rows))
    manifest = folder / "odd.toml"
    manifest.write_text(
        f'title = {json.dumps(title)}\nfolder = "."\nlayout = "table"\nsplit_file = "items.jsonl"\n'
    )
    return manifest


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")
def test_from_images_to_a_page(tmp_path: Path) -> None:
    pytest.importorskip("websocket", reason="needs websocket-client, which jupyterlab brings")
    manifest = dataset(tmp_path / "odd", NAMES[0])
    config = tiny.config(text={"vocab_size": 49408, "context_length": 77})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    study = check_study(
        {
            "title": NAMES[1],
            "models": [{"path": str(tmp_path / "model"), "random_weights": True}],
            "datasets": [str(manifest), "digits"],
            "extract": {"split": "train", "items": 60},
            "score": {"metrics": ["dataset_accuracy", "class_accuracy", "cka_debiased"],
                      "options": {"bootstrap": 20}},
        }
    )  # fmt: skip
    (run,) = run_study(study, tmp_path / "run", only=["extract", "score", "select"], progress=False)
    page = write_report(run.folder, title=NAMES[1], note=NAMES[0])
    markdown = (run.folder / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown
    with chromium(tmp_path / "profile") as tab:
        tab.open(page)
        tab.until("document.documentElement.dataset.charts === 'drawn'")
        assert tab.errors() == []
        assert [url for url in tab.requests() if not url.startswith("file:")] == []
        assert not any(e.get("method") == "Page.javascriptDialogOpening" for e in tab.events)
        assert tab.run("document.querySelectorAll('img[src*=invalid], script[src]').length") == 0
        assert tab.run("document.querySelector('h1').textContent").strip() == NAMES[1]


class Many(tiny.DrawnManifest):
    def items(self, split: str, root: Any = None) -> list[Item]:
        count = len(self.names)
        return [
            Item(f"{split}/{i:03d}.png", i % count, self.names[i % count])
            for i in range(self.count)
        ]


@pytest.mark.parametrize("classes", [1, 2, 5000])
def test_few_and_many_classes(classes: int) -> None:
    manifest = Many(count=60, names=tuple(f"class {i}" for i in range(classes)))
    found = extract(tiny.model(), manifest, "train", progress=False)
    assert len(found.tower("text")) == classes
    scores = score(
        [found], ["class_accuracy", "zero_shot_accuracy", "effective_rank"], progress=False
    )
    assert set(scores["metric"]) >= {"effective_rank"}
    reasons = " ".join(row["reason"] for row in scores.attrs["refused"])
    assert "Traceback" not in reasons
