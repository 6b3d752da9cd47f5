"""What the pages tell people to type exists and agrees with the code."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from vlmlayers.manifests import Manifest

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
)
OF_THE_READER = ("photos",)  # folders that pages take for granted
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(kind: str) -> list[Any]:
    found = []
    for page in PAGES:
        for match in FENCE.finditer((ROOT / page).read_text(encoding="utf-8")):
            if match[1] == kind:
                number = len([f for f in found if f.values[0] == page])
                found.append(pytest.param(page, match[2], id=f"{page}-{number}"))
    return found


def _commands(program: str) -> list[list[str]]:
    lines = [line for block in _blocks("sh") for line in str(block.values[1]).splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part.split(" ")[0] == program]


def _identity(words: list[str]) -> str:
    return " ".join(words[:4])


def test_no_block_is_of_an_unknown_kind() -> None:
    kinds = {m[1] for page in PAGES for m in FENCE.finditer((ROOT / page).read_text("utf-8"))}
    assert kinds == {"sh", "python", "toml", "json"}


def test_the_commands_are_found() -> None:
    assert len(_commands("vlmlayers")) > 25
    assert len(_commands("make")) > 8


def _parse(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """Parse a command with the real parser, without running it."""
    from vlmlayers.cli import app

    command: Any = typer.main.get_command(app)
    context = command.make_context("vlmlayers", list(words))
    while hasattr(command, "commands"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return command, context.params


@pytest.mark.parametrize("words", _commands("vlmlayers"), ids=_identity)
def test_vlmlayers_commands_parse(words: list[str]) -> None:
    command, values = _parse(words[1:])
    assert command.name == next(w for w in reversed(words[1:3]) if w == command.name)
    for name in values.get("datasets") or []:
        assert "/" in name or name in (*OF_THE_READER, *Manifest.names()), name
    for name in values.get("target") or []:
        assert name in Manifest.names()
    if values.get("pretrained") == "openai":
        assert values["model"].endswith("-quickgelu"), "anything else is refused for these weights"
    if command.name == "study" and not str(values["file"]).endswith(".toml"):
        from vlmlayers.study import read_study

        assert read_study(values["file"]).datasets
    if command.name == "score":
        from vlmlayers.metrics import METRICS

        assert set(values["metrics"] or []) <= set(METRICS)
    if command.name == "train":
        from vlmadapters import load_recipe
        from vlmadapters.protocols.table import PROTOCOLS
        from vlmlayers.placement import Placement

        for method in values["method"] or ["mma"]:
            if ".py:" not in method:  # a file of the reader's own
                load_recipe(values["recipe"] or "published", method)
        assert values["protocol"] in PROTOCOLS
        for text in values["placement"] or []:
            assert Placement.parse(text.rpartition(":")[2])


def _spans() -> list[Any]:
    """Return the commands within sentences, which may be cut short."""
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    spans = [(page, s) for page, text in texts.items() for s in re.findall(r"`(vlml[^`]+)`", text)]
    return [pytest.param(*one, id=" ".join(one)) for one in dict.fromkeys(spans) if " " in one[1]]


@pytest.mark.parametrize(("page", "span"), _spans())
def test_commands_within_sentences_name_verbs_and_options_that_exist(page: str, span: str) -> None:
    from vlmlayers.cli import app

    command: Any = typer.main.get_command(app)
    words = span.split()[1:]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        command = command.get_command(
            command.make_context("vlmlayers", [], resilient_parsing=True), name
        )
        assert command is not None, name
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known, page


@pytest.mark.parametrize("wrong", ["scoer runs/x", "train --nothing", "extract mini-clip --out x"])
def test_the_parser_behind_these_tests_refuses_nonsense(wrong: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|unknown|missing|usage"):
        _parse(wrong.split())


@pytest.mark.parametrize("words", _commands("torchrun"), ids=_identity)
def test_torchrun_commands_start_a_module_that_exists(words: list[str]) -> None:
    module = words.index("-m")
    place = ROOT / "analysis" / words[module + 1].replace(".", "/")
    assert (place / "__main__.py").is_file()
    assert _parse(words[module + 2 :])[0].name in ("train", "extract")


@pytest.mark.parametrize("words", _commands("make"), ids=_identity)
def test_make_targets_exist(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets)


@pytest.mark.parametrize(("page", "code"), _blocks("python"))
def test_python_blocks_name_what_there_is(page: str, code: str) -> None:
    """What they import of the two packages, and name behind `vl.` and `va.`, is there."""
    named = []
    for node in ast.walk(ast.parse(f"{{{code}}}" if code.startswith('"') else code, page)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("vlm", "mini")):
            named += [(str(node.module), one.name) for one in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            package = {"vl": "vlmlayers", "va": "vlmadapters"}.get(node.value.id)
            named += [(package, node.attr)] if package else []
    assert [one for one in named if not hasattr(import_module(one[0]), one[1])] == []


@pytest.mark.parametrize(("page", "text"), _blocks("toml"))
def test_toml_blocks_are_what_they_describe(page: str, text: str, tmp_path: Path) -> None:
    from vlmadapters import load_recipe
    from vlmadapters.methods import GROUP as METHODS
    from vlmlayers.manifests.schema import parse_spec
    from vlmlayers.metrics.table import GROUP as METRICS
    from vlmlayers.selection.making import GROUP as RULES
    from vlmlayers.study import check_study

    content = tomllib.loads(text)
    if "project" in content:
        assert set(content["project"]["entry-points"]) == {METRICS, RULES, METHODS}
    elif "models" in content:
        assert len(check_study(content, page).datasets) >= 3
    elif "extends" in content:
        (tmp_path / "my_recipe.toml").write_text(text, encoding="utf-8")
        assert load_recipe(tmp_path / "my_recipe.toml").train.cached_views == 4
    else:
        spec = parse_spec(content, page)
        assert spec.classes == 12 or spec.class_names == ("tench", "goldfish")


@pytest.mark.parametrize(("page", "text"), _blocks("json"))
def test_json_blocks_are_descriptions_of_classes(page: str, text: str, tmp_path: Path) -> None:
    from vlmadapters.methods.descriptions import read_descriptions

    (tmp_path / "sentences.json").write_text(text, encoding="utf-8")
    assert read_descriptions(str(tmp_path / "sentences.json"))


@pytest.mark.parametrize("path", sorted((ROOT / "data_manifests/studies").glob("*.toml")))
def test_study_files_are_valid_and_name_known_datasets(path: Path) -> None:
    from vlmlayers.study import read_study

    assert {part.name for part in read_study(path).datasets} <= set(Manifest.names())


def _fault(code: str, folder: Path) -> str:
    """Run code in a folder; return what it died of, or nothing."""
    environment = os.environ | {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stderr[-2000:] if done.returncode else ""


def test_the_block_on_own_features_runs(tmp_path: Path) -> None:
    code = next(str(b.values[1]) for b in _blocks("python") if "from_arrays" in str(b.values[1]))
    assert _fault(code, tmp_path) == ""


@pytest.mark.slow
def test_the_first_screen_of_the_readme_runs(tmp_path: Path) -> None:
    assert _fault(str(_blocks("python")[0].values[1]), tmp_path) == ""


@pytest.mark.slow
def test_the_stages_of_the_readme_run_as_they_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the run folder that they share, one after the other; and the rule of CONTRIBUTING."""
    from typer.testing import CliRunner

    from vlmlayers.cli import app

    rule = next(str(b.values[1]) for b in _blocks("python") if "last_third" in str(b.values[1]))
    (tmp_path / "my_rules.py").write_text(rule, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    page = "\n".join(m[2] for m in FENCE.finditer((ROOT / "README.md").read_text("utf-8")))
    verbs = ["extract", "score", "select", "report", "figures"]  # training has tests of its own
    stage = re.compile(rf"vlmlayers ({'|'.join(verbs)}) .*\bruns/mine\b")
    typed = [line for line in page.splitlines() if stage.match(line)]
    assert [line.split()[1] for line in typed] == verbs
    own = next(w for w in _commands("vlmlayers") if any("my_rules.py" in part for part in w))
    for words in [*map(shlex.split, typed), [w.replace("runs/demo", "runs/mine") for w in own]]:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, (words, done.output, done.exception)
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 10_000
    assert list((tmp_path / "runs/mine/figures").glob("*.pdf"))


def test_the_rule_of_contributing_chooses_the_last_third() -> None:
    import pandas as pd

    code = next(str(b.values[1]) for b in _blocks("python") if "last_third" in str(b.values[1]))
    space: dict[str, Any] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), space)
    positions = ["embed", *map(str, range(1, 13)), "proj"]
    scores = pd.DataFrame(
        [{"tower": tower, "position": p} for tower in ("vision", "text") for p in positions]
    )
    assert [tuple(blocks) for blocks in space["last_third"](scores)] == [(9, 10, 11, 12)] * 2


def test_the_metric_of_contributing_fits_the_table() -> None:
    from types import SimpleNamespace

    import numpy as np

    table = import_module("vlmlayers.metrics.table")
    blocks = [str(b.values[1]) for b in _blocks("python")]
    space: dict[str, Any] = {}
    exec(next(b for b in blocks if "mean_norm(x)" in b), space)
    entry = next(b for b in blocks if b.startswith('"mean_norm"'))
    names = vars(table) | {"geometry": SimpleNamespace(mean_norm=space["mean_norm"])}
    made = eval(f"{{{entry}}}", names)["mean_norm"]
    assert made.needs in table.NEEDS
    assert made.function(np.array([[3.0, 4.0], [0.0, 5.0]])) == pytest.approx(5.0)


def _rows(heading: str) -> list[list[str]]:
    text = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    table = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in table]


def test_the_guide_lists_the_datasets_as_the_manifests_do() -> None:
    full = _rows(
        "| dataset | name here | images under the data root | split or class names | train"
    )
    shifted = _rows(
        "| dataset | name here | images under the data root | split or class names | te"
    )
    assert (len(full), len(shifted)) == (11, 4)
    for title, name, images, file, *counts in full + shifted:
        spec = Manifest.load(name).spec
        place = f"{spec.folder}/{spec.images}" if spec.images else spec.folder
        splits = ("train", "val", "test") if len(counts) == 3 else ("test",)
        expected = [f"{spec.counts[s]:,}" if s in spec.counts else "–" for s in splits]
        assert title == spec.title
        assert images.split("`")[0] == place
        assert file in (spec.split_file or spec.class_name_file)
        assert counts == expected, name


def test_the_guide_says_where_to_get_every_part_as_the_manifests_do() -> None:
    rows = {row[0]: " ".join(row[1:]) for row in _rows("| dataset | images | split or class")}
    for name in ("imagenet", "caltech101", "food101", "sun397", "dtd", "eurosat", "ucf101"):
        spec = Manifest.load(name).spec
        for part in re.findall(r"https?://[^\s;,)]+|id (\S+)", " ".join(spec.get)):
            assert part in rows[spec.title], (name, part)


def _recipe_rows(page: str) -> dict[str, list[str]]:
    """Return the cells of a table of recipes behind their names."""
    text = (ROOT / "docs/methods" / page).read_text(encoding="utf-8")
    lines = text[text.index("| recipe |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.findall("`([^`]+)`", name)[0]: cells for name, *cells in rows}


def test_the_tables_of_recipes_hold_what_the_recipes_do() -> None:
    from vlmadapters import load_recipe

    for name, (blocks, epochs, weights) in _recipe_rows("promptsrc.md").items():
        recipe = load_recipe(name, "promptsrc")
        centre, spread = weights.partition(";")[0].split(", ")
        first, last = map(int, blocks.split("–"))
        assert recipe.method.vision == recipe.method.text == tuple(range(first, last + 1)), name
        assert recipe.train.epochs == int(epochs), name
        assert (recipe.method.centre, recipe.method.spread) == (float(centre), float(spread)), name
    for name, (rate, epochs, batch, scales, negatives) in _recipe_rows("lweib.md").items():
        recipe = load_recipe(name, "lweib")
        told = (recipe.train.lr, recipe.train.epochs, recipe.train.batch_size)
        assert told == (float(rate), int(epochs), int(batch)), name
        config = recipe.method
        assert [config.alpha, config.factor, config.slow] == [*map(float, scales.split(", "))], name
        assert config.negatives == (-1 if negatives == "all classes" else int(negatives)), name


MARKDOWN = [
    path for folder in (".", "docs", "docs/howto", "docs/methods", "figures/tables", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
]  # fmt: skip


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
              for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}  # fmt: skip
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" in link or "reference/" in link:  # pages that `make docs` writes
            continue
        assert (page.parent / file).exists(), link
        assert file or anchor in places, link
