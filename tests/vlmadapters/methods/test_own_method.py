"""A method of a user's own, in a file outside the repository, goes the whole way."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from backbones import shared_backbone
from typer.testing import CliRunner

import vlmadapters as va
from vlmadapters.cli import train as verbs
from vlmadapters.files import load_method, read_info
from vlmlayers.cli import app
from vlmlayers.errors import UserError


@pytest.fixture
def own(repository: Path, tmp_path: Path) -> Path:
    """The example of CONTRIBUTING.md as a file."""
    section = (repository / "CONTRIBUTING.md").read_text().split("## Add a method")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    file = tmp_path / "my_method.py"
    file.write_text(code)
    return file


def test_the_example_trains_is_saved_and_is_evaluated(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "load_backbone", lambda *_: shared_backbone())
    words = [
        "train",
        "ViT-B-16",
        "--random-weights",
        "faces",
        "--out",
        str(tmp_path / "run"),
        "--method",
        f"{own}:Shift",
    ]
    words += ["--placement", "2-3", "--seeds", "1", "--limit", "20", "--quiet"]
    small = ["epochs=2", "shots=2", "lr=2.0", "crop_scale=0.9,1"]
    words += [part for setting in small for part in ("--set", setting)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "run" / "results.csv")
    trained = table[table["method"] == "Shift"]
    assert list(trained["split_kind"]) == ["base", "novel"]
    assert set(trained["placement"]) == {"v2-3,t2-3"} and set(trained["parameters"]) == {192}
    assert set(trained["settings"]) == {"scale=1.0"} and (trained["changed"] > 0).all()
    (file,) = (tmp_path / "run" / "adapters").glob("*.safetensors")
    assert read_info(file).config.name == "shift"
    assert load_method(file, shared_backbone()).parameter_count() == 192
    words = ["evaluate", "ViT-B-16", "--random-weights", "faces", "--adapter", str(file)]
    done = CliRunner().invoke(app, [*words, "--limit", "20", "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0 and "Shift" in done.output


def test_what_is_no_method_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a method; it has to be a subclass"):
        va.METHODS[f"{own}:ShiftConfig"]
    with pytest.raises(UserError, match="did you mean 'Shift'"):
        va.METHODS[f"{own}:Shaft"]
    with pytest.raises(UserError, match="method file .* does not exist"):
        va.METHODS[f"{tmp_path}/absent.py:Shift"]
    with pytest.raises(UserError, match="a method named 'mma' is known already"):

        class Mine(va.Method):
            Config = va.MMAConfig

        va.METHODS.register(Mine)
