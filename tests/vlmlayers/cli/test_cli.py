"""The command line: thin verbs, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image
from run_folders import make_run, tiny_clip
from score_tables import planted
from synthetic import make_features

import vlmlayers as vl
from vlmlayers.cli import extensions
from vlmlayers.errors import UserError
from vlmlayers.features.writer import write_features
from vlmlayers.files import write_json
from vlmlayers.options import parse_settings
from vlmlayers.report.next_steps import next_steps
from vlmlayers.report.numbers import read_answer
from vlmlayers.runs import Run
from vlmlayers.study import check_study, read_study
from vlmlayers.words import UNTRAINED

VERBS = (
    "demo",
    "init",
    "study",
    "data",
    "models",
    "extract",
    "score",
    "select",
    "train",
    "evaluate",
    "validate",
    "export",
    "report",
    "figures",
)


def test_a_metric_of_ones_own_and_one_line_for_what_was_not_computed(call, tmp_path: Path) -> None:
    run, file = Run(tmp_path / "run"), tmp_path / "mine.py"
    write_features(run.features / "alpha", make_features())
    file.write_text("def mean_norm(x):\n    return (x**2).sum(axis=1).mean() ** 0.5\n")
    code, out, err = call("score", run.folder, "-m", f"{file}:mean_norm", "-m", "style_accuracy")
    assert code == 0 and "scores of 1 metric: " in out
    (line,) = [line for line in err.splitlines() if "not computed" in line]
    assert line == (
        "Warning: not computed: style_accuracy (no two datasets share four or more class names)"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("cli") / "run", small=True)


def test_help_lists_the_verbs_in_order_of_use_without_torch() -> None:
    code = (
        "import sys\nsys.argv = ['vlmlayers', '--help']\nfrom vlmlayers.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    places = [out.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places) and out.strip().endswith("False")
    assert "..." not in out.split("Commands:")[1]  # each verb is said in its line
    assert max(map(len, out.splitlines())) <= 80


def test_user_errors_are_one_line_and_exit_2(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for words, message in (
        (("select", tmp_path), "run `vlmlayers score` first"),
        (("study", tmp_path / "absent.toml"), "does not exist"),
        (("report", tmp_path), "not a run folder"),
        (("score",), "needs a run folder"),
        (("score", tmp_path), "holds no features"),
        (("data", "check", "caltech1001"), "did you mean 'caltech101'"),
        (("models", "ViT-B-61"), "did you mean"),
        (("extract", "ViT-B-32", "digits", "--out", tmp_path, "--precision", "fp9"), "fp32"),
    ):
        code, out, err = call(*words)
        assert code == 2 and message in err, (words, err)
        assert err.startswith("Error: ") and err.count("\n") == 1 and "Traceback" not in err
        assert out == ""


def test_wrong_usage_exits_2_and_faults_are_not_hidden(call, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert call("selekt")[0] == 2
    assert call("select")[0] == 2

    def broken(*_: object, **__: object) -> str:
        raise RuntimeError("a fault")

    monkeypatch.setattr("vlmlayers.study.verbs.metrics_text", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        call("score", "--list")


def test_wrong_usage_is_one_line_that_names_the_help(call) -> None:  # type: ignore[no-untyped-def]
    for words, message in (
        (("demo", "--bad"), "--bad"),
        (("demo", "--bad"), "No such option"),
        (("demo", "--bad"), ". See `vlmlayers demo --help`."),
        (("selekt",), "unknown verb 'selekt'; did you mean 'select'?"),
        (("trian", "mini-clip"), "did you mean 'train'?"),  # of another package
        (("train", "a", "b", "--out", "c", "--batch-size", "4"), "as --set batch_size=…. See"),
        (("extract", "a", "b", "--items-per"), "--items, --template). See `vlmlayers"),
        (
            ("select", "here", "--resamples", "many"),
            "'--resamples': a whole number is needed. See `vlmlayers select --help`.",
        ),
        (("data", "lost"), "`vlmlayers data --help`"),
        (("train", "a", "b", "--out", "c", "--together", "1.5"), "a whole number is needed"),
    ):
        code, out, err = call(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err
        assert err.startswith("Error: ")


@pytest.mark.parametrize(
    "given",
    [
        ["select", ""],
        ["report", " "],
        ["extract", "mini-clip", "flags", "--out="],
        ["train", "mini-clip", "flags", "--out", ""],
        ["data", "check", ""],
    ],
)
def test_a_variable_that_is_not_set_is_no_path(call, given: list[str]) -> None:  # type: ignore[no-untyped-def]
    """As a path the empty text is the current folder, into which results were written."""
    code, out, err = call(*given)
    assert code == 2 and not out and "an argument is empty, as a shell variable" in err


def test_version_and_short_help(call) -> None:  # type: ignore[no-untyped-def]
    assert call("--version")[:2] == (0, f"vlmlayers {version('vlm-layers')}\n")
    for verb in ((), ("select",), ("train",), ("data", "list")):
        code, out, _ = call(*verb, "-h")
        assert (code, out) == call(*verb, "--help")[:2] and code == 0 and "Usage: vlmlayers" in out
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "option", "values"),
    [
        (("score", "--list"), "--metric", ("cka_debiased", "dataset_accuracy")),
        (("models",), "", ("RN50", "ViT-B-16")),
        # What is wrong is said of the second value: both were read.
        (("figures", "RUN"), "--format", ("pdf", "gif")),
        (("study", "small_demo"), "--only", ("extract", "scor")),
        (("study", "small_demo"), "--skip", ("extract", "scor")),
        (("data", "check"), "", ("digits", "digts")),
        (("data", "shards", "digits", "--out", "x"), "--split", ("train", "vall")),
        (("extract", "mini-clip", "digits", "--out", "x"), "--spaces", ("native", "nativ")),
        (("extract", "mini-clip", "--out", "x"), "", ("digits", "digts")),
        (("train", "mini-clip", "digits", "--out", "x"), "--seeds", ("1", "two")),
        (("train", "mini-clip", "digits", "--out", "x"), "--method", ("mma", "maplee")),
        (("train", "mini-clip", "digits", "--out", "x"), "--pairs", ("5:7", "6")),
        (("search", "mini-clip", "digits", "--out", "x"), "--seeds", ("1", "two")),
        (("evaluate", "mini-clip", "digits"), "--adapter", ("here,1.safetensors", "none.pth")),
        (("validate", "mini-clip", "digits", "--out", "x", "--placement", "5-12"), "--kinds",
         ("paper", "papre")),
    ],
)  # fmt: skip
def test_commas_and_repetition_say_the_same(
    words: tuple[str, ...],
    option: str,
    values: tuple[str, ...],
    call,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    Path("here,1.safetensors").touch()  # a name with a comma stays whole where it is a file
    given = [str(run.folder) if word == "RUN" else word for word in words]
    before = [option] if option else []
    repeated = [word for value in values for word in (*before, value)]
    both = call(*given, *repeated)
    assert "here" in values[0] or call(*given, *before, ",".join(values)) == both
    assert call(*given, *before, ", ".join(values[:1]), *before, f" {values[1]},") == both
    assert values[1] in "".join(both[1:])
    if option:
        assert "nothing is named" in call(*given, option, ",")[2]
    assert "an argument is empty" in " ".join(call(*given, *repeated, *before, "")[2].split())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "data"])
def test_help_names_no_type_of_python(verb: str, call) -> None:  # type: ignore[no-untyped-def]
    shown = call(verb, "-h")[1]
    assert "list[" not in shown and "repeatable" not in shown
    assert all(line == line.rstrip() for line in shown.splitlines())


def test_init_writes_a_study_that_runs_with_and_without_its_comments(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "mine.toml"
    code, out, _ = call("init", file)
    assert code == 0 and out.splitlines()[-1] == f"vlmlayers study {file}"
    read_study(file)
    code, _, err = call("init", file)
    assert code == 2 and "--force" in err and call("init", file, "--force")[0] == 0
    code, out, err = call("study", file, "--out", tmp_path / "run", "--only", "extract", "--quiet")
    assert code == 0 and len(Run(tmp_path / "run").stores()) == 3, err
    text = file.read_text().replace('models = [{ name = "mini-clip" }]', "")
    whole = re.sub(r"^# (?=\[?\w+\]? *(=|#))", "", text, flags=re.MULTILINE)
    study = check_study(tomllib.loads(re.sub(r"^# (?=\[)", "", whole, flags=re.MULTILINE)))
    assert study.validate_ is not None and study.extract.workers == 4


def test_full_disk_is_one_line(call, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device", "scores.csv")

    monkeypatch.setattr("vlmlayers.study.verbs.metrics_text", full)
    code, _, err = call("score", "--list")
    assert code == 2 and "cannot write scores.csv: No space left on device; free space" in err


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs a system whose files have owners")
@pytest.mark.parametrize(
    ("closed", "touched", "words"),
    [
        ("file", "read", r"cannot read \S+/file: Permission denied; allow yourself to read it and"),
        ("folder", "list", r"cannot read \S+/folder: Permission denied; allow yourself to read it"),
        ("folder", "enter", r"cannot reach \S+/within: .*; allow yourself to enter its folder and"),
        (
            "locked",
            "write",
            r"cannot write \S+/locked/new: .*; choose a folder that can be written",
        ),
        ("readable", "write", r"cannot write \S+/readable: .*; choose a folder that can be writ"),
    ],
)
def test_refused_permission_tells_reading_from_writing(
    call, monkeypatch, tmp_path: Path, closed: str, touched: str, words: str
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / closed
    if closed in ("folder", "locked"):
        path.mkdir()
    else:
        path.touch()
    path.chmod({"locked": 0o555, "readable": 0o444}.get(closed, 0))
    for parent in (tmp_path, *tmp_path.parents):  # another user has to get as far as here
        if "pytest-" in str(parent):
            parent.chmod(0o755)

    def touch(*_: object, **__: object) -> str:
        if touched == "list":
            return str(list(path.iterdir()))
        if touched == "write":
            return str((path / "new" if closed == "locked" else path).write_text("x"))
        return (path / "within" if touched == "enter" else path).read_text()

    monkeypatch.setattr("vlmlayers.study.verbs.metrics_text", touch)
    owner = os.geteuid()
    if owner == 0:  # whom no file refuses
        os.seteuid(65534)
    try:
        code, _, err = call("score", "--list")
    finally:
        os.seteuid(owner)
        path.chmod(0o755)
    assert code == 2 and re.search(words, err) and err.count("\n") == 1, err


def test_extract_refuses_another_extraction_until_forced(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, out = tiny_clip(tmp_path / "tiny-clip"), tmp_path / "run"
    words = ("extract", model, "digits", "--random-weights", "--out", out, "--quiet", "--items")
    assert call(*words, 10)[0] == 0
    code, _, err = call(*words, 12)
    assert code == 2 and "12 now: 2 added" in err and "--force" in err
    assert call(*words, 12, "--force")[0] == 0
    record = json.loads((out / "provenance.json").read_text())
    assert record["datasets"]["digits"]["items"] == 12


def test_scores_of_an_earlier_extraction_are_told(
    call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    model, out = tiny_clip(tmp_path / "tiny-clip"), tmp_path / "run"
    extract = ("extract", model, "digits", "--random-weights", "--out", out, "-q", "--items")
    score = ("score", out, "--metric", "effective_rank", "-q")
    choose = ("select", out, "--rule", "budget", "--set", "score=metric:effective_rank", "-q")
    told = "the scores were not made from the features of digits (train) that are here"
    assert call(*extract, 20)[0] == 0
    for verb in (score, choose):  # each is read by itself
        assert UNTRAINED in call(*verb)[1].replace("\n", " ")
    assert UNTRAINED in repr(vl.LayerChoice.load(out / "choice.json")).replace("\n", " ")
    assert call(*choose)[0] == 0 and told not in caplog.text and not read_answer(out).stale
    assert call(*extract, 24, "--force")[0] == 0
    assert call(*choose)[0] == 0 and told in caplog.text
    doubt = read_answer(out).doubts[0]
    assert told in doubt and "`" not in doubt  # as a page shows it
    caplog.clear()
    assert call(*score)[0] == call(*choose)[0] == 0
    assert told not in caplog.text and not read_answer(out).stale


def test_features_that_were_extracted_since_and_not_scored_are_told(
    call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    """The report describes the last extraction, of which the scores may hold nothing."""
    model, out = tiny_clip(tmp_path / "tiny-clip"), tmp_path / "run"
    extract = ("extract", model, "--random-weights", "--out", out, "--items", 20, "-q")
    score = ("score", out, "--metric", "effective_rank", "-q")
    choose = ("select", out, "--rule", "budget", "--set", "score=metric:effective_rank", "-q")
    told = "the scores were not made from the features of flags (train) that are here"
    assert call(*extract, "digits")[0] == call(*score)[0] == call(*choose)[0] == 0
    assert call(*extract, "flags")[0] == 0 and not caplog.text
    assert call(*choose)[0] == 0 and told in caplog.text
    assert told in read_answer(out).doubts[0]
    caplog.clear()
    assert call(*score)[0] == call(*choose)[0] == 0
    answer = read_answer(out)
    assert told not in caplog.text and not answer.stale
    # What was scored, of whatever extraction, is what a choice is proved on.
    assert " flags digits --choice " in next_steps(answer)[0].code


def test_an_extraction_that_finds_features_keeps_the_time_they_took(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """By which the report tells how long a training takes."""
    model, out = tiny_clip(tmp_path / "tiny-clip"), tmp_path / "run"
    extract = ("extract", model, "--random-weights", "--out", out, "--items", 20, "-q")
    seconds = []
    for names in (["digits"], ["digits", "flags"], ["flags", "digits"]):
        assert call(*extract, *names)[0] == 0
        found = json.loads((out / "provenance.json").read_text())["datasets"]
        seconds.append({name: one["seconds"] for name, one in found.items()})
    assert seconds[0]["digits"] == seconds[1]["digits"] and seconds[1] == seconds[2]


@pytest.mark.parametrize("verb", ["figures", "report"])
def test_a_folder_that_was_trained_into_is_told_how_it_is_drawn(
    call, verb: str, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "results.csv").write_text("method\n")
    code, _, err = call(verb, tmp_path)
    assert code == 2 and f"`vlmlayers figures {tmp_path} --paper FOLDER`" in err.replace("\n", " ")


def test_score_names_an_unfinished_extraction(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """As of a dataset with an unreadable image; its folder looks like one of features."""
    (tmp_path / "features" / "mine-train.partial").mkdir(parents=True)
    code, _, err = call("score", tmp_path)
    assert code == 2 and "mine-train.partial is not finished; start its extraction again" in err


def test_a_forced_stream_replaces_the_sums_of_another(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, out = tiny_clip(tmp_path / "tiny-clip"), tmp_path / "run"
    vl.models.stream(
        vl.load_model(str(model), random_weights=True), "digits", "train", items=8,
        out=out / "streams" / "digits-train", progress=False,
    )  # fmt: skip
    words = ("extract", model, "digits", "--random-weights", "--out", out, "--quiet", "--streaming")
    assert call(*words, "--items", 10)[0] == 2
    code, said, err = call(*words, "--items", 10, "--force")
    # What is not there is said here as by `score`.
    assert code == 0 and "not computed: dataset_accuracy_lda (1 dataset; at least 2" in err
    assert UNTRAINED in said
    assert set(vl.read_scores(out)["n"]) <= {10}
    # Extracting as before would bring no features.
    code, _, err = call("score", out)
    assert code == 2 and "extract without --streaming" in err


def test_metrics_of_the_model_refuse_captions_before_it_is_loaded(
    call, monkeypatch, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "c.tsv").write_text("".join(f"{n}.png\ta dot {n}\n" for n in range(6)))
    (tmp_path / "set.toml").write_text(
        'title = "Told"\nfolder = "."\nlayout = "captions"\nsplit_file = "c.tsv"\nclasses = 0\n'
        "tail = { val = 1, test = 1 }\n"
    )
    model, out = tiny_clip(tmp_path / "tiny-clip"), tmp_path / "run"
    words = (model, tmp_path / "set.toml", "--random-weights", "--data-root", tmp_path, "--quiet")
    assert call("extract", *words, "--text", "captions", "--out", out)[0] == 0
    monkeypatch.setattr("vlmlayers.models.load_model", None)
    code, _, err = call("score", out, "--metric", "skip_joint_change")
    assert (code, err.count("\n")) == (2, 1) and "set has no classes, by prompts of" in err, err


def test_a_dataset_that_is_left_out_is_told_of_last(call, caplog, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "1.png").write_text("no image")
    words = ("extract", "mini-clip", tmp_path / "broken", "digits", "--split", "all")
    more = ("--items", "4", "--tower", "vision", "--out", tmp_path / "run", "--workers", "0")
    assert call(*words, *more)[0] == 0
    assert "lacks 1 dataset, which could not be extracted: broken-all" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("words", "expected"), [((), 2), (("--skip", "validate"), 0), (("--only", "score"), 0)]
)
def test_a_void_verdict_counts_where_the_study_validates(
    call, monkeypatch, tmp_path: Path, words: tuple[str, ...], expected: int
) -> None:  # type: ignore[no-untyped-def]
    run = Run(tmp_path)
    write_json(run.verdict, {"verdict": "VOID: training changed nothing", "void": True})
    monkeypatch.setattr("vlmlayers.study.run_study", lambda *_, **__: [run])
    file = tmp_path / "study.toml"
    text = 'models = [{ name = "mini-clip" }]\ndatasets = ["digits"]\n'
    file.write_text(f"{text}[validate]\n")
    assert call("study", file, *words)[0] == expected
    file.write_text(text)
    assert call("study", file)[0] == 0


def test_a_table_of_captions_makes_no_prompts_before_the_model_is_loaded(
    call, monkeypatch, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "items.csv").write_text("path,caption\na.png,a dot\n")
    monkeypatch.setattr("vlmlayers.models.load_model", None)
    words = ("extract", "mini-clip", tmp_path / "items.csv", "--split", "all")
    code, _, err = call(*words, "--out", tmp_path / "run")
    said = f"{tmp_path.name} has no classes to make prompts"
    assert (code, err.count("\n")) == (2, 1) and said in err, err


@pytest.mark.parametrize(
    ("text", "message"),
    [("prompts", "set has no classes to make prompts"), ("captions", "set has no captions; use")],
)
def test_images_of_hugging_face_lack_texts_before_the_model_is_loaded(
    call, monkeypatch, tmp_path: Path, text: str, message: str
) -> None:  # type: ignore[no-untyped-def]
    """Its library imports torch, so that it is loading the model that is spared here."""
    pytest.importorskip("datasets", reason="needs the extra 'datasets'")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    (tmp_path / "set.toml").write_text(
        'title = "Set"\nfolder = "./images"\nlayout = "huggingface"\n'
    )
    monkeypatch.setattr("vlmlayers.models.load_model", None)
    words = ("extract", "mini-clip", tmp_path / "set.toml", "--split", "train", "--text", text)
    code, _, err = call(*words, "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1) and message in err, err


def test_a_command_to_copy_quotes_the_folder(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "my run"
    vl.write_scores(planted(), folder)
    code, _, err = call("report", folder)
    assert code == 2 and f"run `vlmlayers select '{folder}'` first" in err


def test_select_and_report_verbs(call, run: Run) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call(
        "select", run.folder, "--rule", "budget", "-s", "n=3", "-s", "span=true", "--resamples", 20
    )
    assert code == 0 and out.startswith("adapt vision ")
    assert max(map(len, out.splitlines()[:-1])) <= 80
    choice = json.loads(run.choice.read_text())
    assert len(choice["vision"]) == 3 and choice["rule"] == "budget"
    code, out, _ = call("report", run.folder, "--title", "By hand")
    assert code == 0 and "By hand" in run.report.read_text()
    code, _, err = call("report", run.folder, "--out", run.folder / "elsewhere")
    assert code == 2 and "--out is for a comparison" in err
    code, out, _ = call("figures", run.folder, "--format", "svg")
    assert code == 0 and all(Path(line).exists() for line in out.split())
    code, _, err = call("select", run.folder, "-s", "n")
    assert code == 2 and "is not KEY=VALUE" in err
    code, _, err = call("select", "nowhere", "--rule", "paper", "--resamples", 20)
    assert code == 2 and "rule 'paper' reads no score; leave resamples out" in err


def test_tables_read_well_at_80_columns(call) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("score", "--list")
    assert code == 0 and "dataset_accuracy" in out and max(map(len, out.splitlines())) <= 80
    code, out, _ = call("models", "ViT-B-32", "RN50")
    assert code == 0 and "12 × 768" in out and "3+4+6+3" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = call("data", "list")
    assert code == 0 and "caltech101" in out
    assert max(map(len, out.splitlines())) <= 80


def test_data_check_exits_2_for_what_was_asked_for_and_is_missing(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("data", "check", "caltech101", "--data-root", tmp_path)
    assert code == 2 and "caltech101" in out
    assert call("data", "check", "digits")[0] == 0


def test_settings() -> None:
    assert parse_settings(
        ["a=1", "b=[1, 2]", "c=x", "d=true", "e=a=b", "f=1,2.5", "g=a,b", "h="]
    ) == {
        "a": 1,
        "b": [1, 2],
        "c": "x",
        "d": True,
        "e": "a=b",
        "f": [1, 2.5],
        "g": "a,b",
        "h": "",
    }
    with pytest.raises(UserError, match="KEY=VALUE"):
        parse_settings(["=1"])
    with pytest.raises(UserError, match="'a=2': a is set already; set it once"):
        parse_settings(["a=1", "b=3", "a=2"])


def test_a_broken_extension_says_so(call, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    class Broken:
        @staticmethod
        def load() -> object:
            raise ImportError("no module named lost")

    monkeypatch.setattr(extensions, "packaged", lambda group: {"broken": Broken()})
    code, _, err = call("broken")
    assert code == 2 and "cannot be loaded: no module named lost" in err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_in_one_line(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "vlmlayers.cli",
        "extract",
        str(tiny_clip(tmp_path / "tiny-clip")),
        "--random-weights",
        "letters",
        "--split",
        "train",
        "--items",
        "2000",
        "--batch-size",
        "1",  # slow enough to be met while it works
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("extract"):
            break
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Start the same command again" in err and "Traceback" not in err


@pytest.mark.parametrize(("processes", "ends"), [("1", 143), ("2", -signal.SIGTERM)])
def test_torchrun_ends_what_waits_for_a_process_that_died(processes: str, ends: int) -> None:
    """Waiting for another process is not Python's: a stop as by Ctrl-C would never be seen."""
    code = (
        "import os, signal\nfrom vlmlayers.cli import command\n"
        "command.app = lambda **_: os.kill(os.getpid(), signal.SIGTERM)\ncommand.main()\n"
    )
    environment = {**os.environ, "WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == ends, done.stderr


def test_a_stop_that_is_sent_twice_ends_as_one() -> None:
    """As `timeout` sends it: to the process, and again to its group while that ends."""
    code = (
        "import atexit, os, signal\nfrom vlmlayers.cli import command\n"
        "def stop(**_): os.kill(os.getpid(), signal.SIGTERM)\n"
        "atexit.register(stop)\ncommand.app = stop\ncommand.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("arguments", [("score", "nowhere"), ("report", "nowhere")])
def test_a_wrong_folder_is_said_before_anything_large_is_imported(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom vlmlayers.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    large = {'torch', 'pandas', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "    print(end.code, sorted(large))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "2 []"
    assert done.stderr.startswith("Error: nowhere")
