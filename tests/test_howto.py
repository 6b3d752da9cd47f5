"""Every block of the pages "How do I …" runs as it stands, in order, on tiny models and data."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from typer.testing import CliRunner

import vlmlayers as vl

transformers_models = pytest.importorskip("transformers_models", reason="needs the extra 'hf'")
pytest.importorskip("peft", reason="needs the extra 'peft'")
HOWTO = Path(__file__).parents[1] / "docs" / "howto"
PAGES = sorted(page for page in HOWTO.glob("*.md") if page.stem != "index")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.slow


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the pages name: `photos/` and the Hugging Face folder `my_clip/`."""
    data = vl.Manifest.load("signs")
    for item in data.items("train")[:80]:
        path = tmp_path / "photos" / item.class_name / f"{Path(item.path).name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.open_image(item, size=64).save(path)
    transformers_models.clip_folder(tmp_path / "my_clip")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    known = set(vl.metrics.METRICS)
    yield tmp_path
    for name in set(vl.metrics.METRICS) - known:
        del vl.metrics.METRICS[name]


def type_in(line: str) -> None:
    """Run one line of a shell block."""
    words = shlex.split(line)
    if words[0].startswith("CUDA_VISIBLE_DEVICES="):
        words = words[1:]  # the test may be on a machine of one GPU
    if words[0] == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    from vlmlayers.cli import app

    assert words[0] == "vlmlayers", line
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, (line, done.output[-2000:], done.exception)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page: Path, workplace: Path) -> None:
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    assert blocks, "a page shows how"
    space: dict[str, object] = {"__name__": "__main__"}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, page.name, "exec"), space)
        elif kind == "sh":
            for line in text.splitlines():
                type_in(line)
        else:
            assert kind == "toml"  # which another test reads
