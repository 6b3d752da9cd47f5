"""Every verb takes -q and -v: results alone, or what is done and how long it took."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from run_folders import make_run, tiny_clip

from vlmlayers import cli
from vlmlayers.cli import command
from vlmlayers.progress import bar, hidden
from vlmlayers.runs import Run

LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING) +vlm(layers|adapters)[\w.]*: .+")


def commands(
    command: Any, words: tuple[str, ...] = (), above: Any = None
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words of every command of the tree, and the command."""
    yield words, command
    context = command.make_context("vlmlayers", [], parent=above, resilient_parsing=True)
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        yield from commands(command.get_command(context, name), (*words, name), context)


TREE = dict(commands(typer.main.get_command(cli.app)))
VERBS = [words for words, command in TREE.items() if not hasattr(command, "list_commands")]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of an untrained model small enough to run in a second."""
    tiny_clip(tmp_path / "tiny")
    file = tmp_path / "study.toml"
    file.write_text("""
models = [{ path = "tiny", random_weights = true }]
datasets = ["digits", "shapes_filled"]
extract = { items = 20, split = "val" }
score = { metrics = ["dataset_accuracy", "cka_debiased"] }
select = { resamples = 20 }
report = { formats = ["svg"] }
""")
    return file


def test_the_tree_holds_the_verbs_of_both_packages() -> None:
    assert {("data", "list"), ("extract",), ("train",), ("search",), ("export",)} <= set(VERBS)


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_every_verb_takes_both(words: tuple[str, ...]) -> None:
    taken = [name for option in TREE[words].params for name in option.opts]
    assert [taken.count(name) for name in ("-q", "--quiet", "-v", "--verbose")] == [1, 1, 1, 1]


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_logs_when_asked_and_leaves_the_loggers_as_they_were(
    words: tuple[str, ...], call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    required = [p for p in TREE[words].params if p.required]
    given = [x for p in required for x in ([p.opts[0]] if p.opts[0][0] == "-" else []) + ["absent"]]
    # What finds nothing wrong with a name that is absent would start to work.
    given += {("demo",): ["--out", "file/run"], ("init",): ["file/study.toml"]}.get(words, [])
    Path("file").touch()
    before = [logging.getLogger(name).handlers[:] for name in ("vlmlayers", "vlmadapters")]
    for said in ((*words, "-v", *given), ("-v", *words, "-v", *given)):
        err = call(*said)[2].splitlines()
        assert LINE.fullmatch(err[-1 if err[-1][:5] != "Error" else -2]), err
        assert sum("all took" in line for line in err) == 1
    assert before == [logging.getLogger(n).handlers for n in ("vlmlayers", "vlmadapters")]
    assert "all took" not in call(*words, *given)[2]


def test_both_at_once_are_refused(call: Any) -> None:
    assert call("-q", "data", "list", "-v")[0] == 2
    assert call("models", "-q", "-v")[::2] == (
        2, "Error: --quiet and --verbose contradict each other; give one\n",
    )  # fmt: skip


def test_a_terminal_shows_errors_between_words(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is piped stays one line; a path longer than the terminal stays whole."""
    monkeypatch.setenv("COLUMNS", "40")
    words = ("report", tmp_path / "folder")
    piped = call(*words)[2]
    monkeypatch.setattr(sys.stderr.__class__, "isatty", lambda _: True)
    shown = call(*words)[2]
    assert piped.count("\n") == 1 and piped.split() == shown.split()
    assert all(len(line) <= 40 or " " not in line for line in shown.splitlines())


def test_quiet_leaves_results(call: Any, study: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run", "--skip", "report")
    _, loud, _ = call("study", study, *out)
    code, quiet, err = call("study", study, *out, "-q", "--force")
    assert code == 0 and not err
    lost = [line.split()[0] for line in loud.splitlines() if line not in quiet]
    assert lost == ["loading", "extract", "extract", "score"]
    assert "RANDOM WEIGHTS" in quiet and "select " in quiet
    assert call("study", study, *out, "--quiet")[1].count("\n") == 1


def test_hidden_holds_within_and_not_after(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with hidden():
        list(bar([1], "first"))
    list(bar([1], "second"))
    err = capsys.readouterr().err
    assert "first" not in err and "second" in err


def test_verbose_says_files_caches_and_seconds(call: Any, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _, shown, err = call("study", study, "--out", out, "-v")
    assert all(map(LINE.fullmatch, err.splitlines())) and "DEBUG" not in shown
    for stage in ("extract", "score", "select", "report"):
        assert f"{stage} runs: has not finished before" in err
        assert re.search(rf"runner: {stage} took \d+\.\d\d s", err)
    size = (out / "choice.json").stat().st_size
    assert f"wrote {out / 'choice.json'} ({size:,} bytes)" in err
    assert f"read {out / 'scores.parquet'} (" in err
    assert "dataset_accuracy took" in err and "0 of 1 batches are there" in err

    study.write_text(study.read_text().replace("resamples = 20", "resamples = 21"))
    text = call("study", study, "--out", out, "-v")[2]
    assert "select runs: changed since: select" in text and "extract runs" not in text
    Run(out).scores.unlink()
    text = call("study", study, "--out", out, "-v")[2]
    assert f"score runs: not there: {out / 'scores.parquet'}" in text
    text = call("study", study, "--out", out, "-v", "--force", "--only", "select")[2]
    assert "select runs: asked for with --force" in text


def test_verbs_of_one_stage_say_what_they_read(call: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", small=True)
    for verb in (("select", run.folder), ("figures", run.folder, "--format", "svg")):
        code, _, err = call(*verb, "-v")
        assert code == 0 and f"read {run.scores}" in err and "wrote" in err


def test_a_warning_beside_bars_has_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    monkeypatch.setattr(logging.getLogger("vlmlayers"), "propagate", False)  # pytest's handlers

    def verb(**_: Any) -> None:
        with bar(total=2, description="cells"):
            list(bar(range(3), "train"))  # below; it ends at the right edge of its row
            logging.getLogger("vlmlayers.x").warning("nothing changed")

    monkeypatch.setattr(command, "app", verb)
    with pytest.raises(SystemExit):
        command.main()
    assert re.search(r"[\r\n]nothing changed\n", terminal.getvalue())
