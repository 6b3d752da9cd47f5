"""What is wrong is said before anything large is imported, in every verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

LARGE = ("torch", "open_clip", "sklearn", "pandas", "pyarrow", "matplotlib", "scipy.stats")
STUDY = 'models = [{ name = "mini-clip" }]\ndatasets = ["faces"]\n'
STUDIES = {
    "key": STUDY + "[extract]\nitms = 3\n",
    "metric": STUDY + '[score]\nmetrics = ["nosuch"]\n',
    "rule": STUDY + '[select]\nrule = "nosuch"\n',
    "option": STUDY + "[score]\noptions = { sds = 3 }\n",
    "dataset": STUDY.replace("faces", "nosuch"),
    "model": STUDY.replace("mini-clip", "nosuch"),
    "captions": STUDY.replace("faces", "set.toml")
    + '[extract]\ntext = "captions"\n[score]\nmetrics = ["cka_debiased", "skip_joint_change"]\n',
    # What trains needs classes; extraction, which comes first, needs none.
    **{
        stage: STUDY.replace("faces", "set.toml")
        + '[extract]\ntext = "captions"\n[score]\nmetrics = ["cka_debiased"]\n'
        + f"[{table}]\n"
        for stage, table in (("search", "search"), ("train", "[train]"), ("validate", "validate"))
    },
    "recipe": STUDY + '[[train]]\nrecipe = "nosuch"\n',
}
CAPTIONS = 'title = "Told"\nfolder = "."\nlayout = "captions"\nsplit_file = "c.tsv"\nclasses = 0\n'
WRONG = """
extract mini-clip set.toml --out here --data-root .
train mini-clip set.toml --out here --data-root .
evaluate mini-clip set.toml --data-root .
evaluate mini-clip faces --kind nosuch
score nosuch
score --list --metric nosuch
score --list --jobs 2
report . --out here
figures . --paper here --format pdf
study small_demo --only score --skip score
study small_demo --only search
select nosuch
select /nosuch --rule nosuch
report scored
figures scored
report nosuch
figures nosuch
figures nosuch --format nosuch
figures nosuch --paper here
models nosuch
data check nosuch
data shards nosuch --out here
demo --nosuch
study nosuch.toml
extract nosuch faces --out here
extract mini-clip nosuch --out here
extract nosuch faces --out here --streaming
extract mini-clip nosuch --out here --streaming
extract mini-clip folder --out here --split train --text captions
extract mini-clip folder --out here --split train --text captions --streaming
extract ViT-B-16 faces --out here
extract ViT-B-16 faces --out here --pretrained nosuch
extract mini-clip faces --out here --split nosuch
extract mini-clip faces --out here --adapter nosuch
extract mini-clip faces --out here --adapter scored/scores.csv --method nosuch
extract mini-clip faces --out here --estimate --tower text
extract mini-clip caltech101 --out here --estimate --data-root .
extract nosuch faces --out here --estimate
extract mini-clip faces --out here --estimate --streaming
extract mini-clip faces --out here --seed 3
extract mini-clip faces --out here --tower vision --text captions
extract mini-clip faces --out here --tower vision --pooling text=mean
extract mini-clip faces --out here --text captions --template {}!
extract mini-clip faces --out here --pooling cls,mean
train nosuch faces --out here
extract bert faces --out here --random-weights
train mini-clip nosuch --out here
train dino faces --out here --random-weights
evaluate bert faces --random-weights
evaluate dino faces
train mini-clip faces --out here --method nosuch
train mini-clip faces --out here --protocol nosuch
train mini-clip faces --out here --placement nosuch
train mini-clip faces --out here --placement 5-13
train ViT-L-14 faces --random-weights --out here --method mma,cliplora --placement mma:v9-25
validate mini-clip faces --out here --placement t13
train mini-clip faces --out here --set epochs=1 --set epochs=2
train mini-clip faces --out here --set beta2=0.9
train mini-clip faces --out here --method cliplora --recipe published --set epochs=3
train mini-clip faces --out here --method tip,linear-probe --set lr=3
train mini-clip faces --out here --method mma --placement mma:5-12 --placement 9-12
validate mini-clip faces --out here --placement 5-12 --amount given --folds 3
validate mini-clip faces --out here --placement 5-12 --amount given --amounts lr=1
validate mini-clip faces --out here --placement 5-12 --kinds all --random-count 5
evaluate nosuch faces
evaluate mini-clip nosuch
evaluate mini-clip faces --adapter nosuch
validate nosuch faces --out here --placement 5-12
validate mini-clip nosuch --out here --placement 5-12
validate mini-clip faces --out here --choice nosuch
export mini-clip mma.safetensors --out x --form merged
search nosuch faces --out here
search mini-clip nosuch --out here
search mini-clip faces --out here --criterion nosuch
"""
# Each command in a process that was forked before it: what one imports, the next does not see.
EACH = """
import json, os, sys
import vlmadapters.cli.train, vlmadapters.training.recipes, vlmlayers.cli, vlmlayers.metrics
import vlmlayers.selection.making, vlmlayers.study.preflight  # what many import, once
commands, large = json.loads(sys.stdin.read())
for words in commands:
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["vlmlayers", *words]
        code = 0
        try:
            vlmlayers.cli.main()
        except SystemExit as stop:
            code = stop.code
        found = [name for name in large if name in sys.modules]
        os.write(write, ("\\n" + json.dumps([code, found])).encode())
        os._exit(0)
    os.close(write)
    text = os.fdopen(read).read()
    os.wait()
    print(json.dumps(text.splitlines()))
"""


def test_an_error_that_needs_no_model_imports_nothing_large(tmp_path: Path) -> None:
    commands = [line.split() for line in WRONG.strip().splitlines()]
    (tmp_path / "set.toml").write_text(CAPTIONS)
    (tmp_path / "c.tsv").write_text("0.png\ta dot\n" * 4)
    for name in ("ant", "bee"):
        (tmp_path / "folder" / "train" / name).mkdir(parents=True)
        (tmp_path / "folder" / "train" / name / "1.png").touch()
    for name, told in (("bert", {"vocab_size": 9}), ("dino", {"image_size": 32})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": name, **told}))
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored" / "scores.csv").touch()
    told = {"description": json.dumps({"method": "mma"})}
    save_file({"weight": np.zeros(1)}, tmp_path / "mma.safetensors", told)
    for name, text in STUDIES.items():
        (tmp_path / f"{name}.toml").write_text(text)
        commands.append(["study", f"{name}.toml"])
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=json.dumps([commands, LARGE]), capture_output=True, text=True, cwd=tmp_path,
        check=True,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(commands)
    for words, (*lines, last) in zip(commands, answers):
        assert json.loads(last) == [2, []], (words, lines)
        assert "Error: " in " ".join(lines), lines


def test_tables_and_help_import_nothing_large(tmp_path: Path) -> None:
    commands = [["data", "list"], ["models"], ["--help"], ["select", "--help"], ["train", "--help"]]
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=json.dumps([commands, LARGE]), capture_output=True, text=True, cwd=tmp_path,
        check=True,
    )  # fmt: skip
    for words, line in zip(commands, done.stdout.splitlines()):
        assert json.loads(json.loads(line)[-1]) == [0, []], words


@pytest.mark.parametrize("installed", [True, False])
def test_an_interrupt_while_the_command_is_imported_is_one_line(
    installed: bool, tmp_path: Path
) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")  # Ctrl-C in the first 0.3 s
    script = [str(Path(sys.executable).with_name("vlmlayers"))]
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*(script if installed else [sys.executable, "-m", "vlmlayers"]), "models"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr.strip().startswith("Stopped. Start the same command again")
    assert "or starts over" in done.stderr, "this verb saves nothing to go on from"
    assert len(done.stderr.strip().splitlines()) == 1
