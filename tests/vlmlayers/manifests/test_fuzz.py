"""Hostile manifests and lists: whatever they hold, the answer is data or one line of refusal."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_fixtures import coop_dataset, use, write_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmlayers.errors import UserError
from vlmlayers.manifests import Manifest
from vlmlayers.manifests.schema import Spec, parse_spec

FEW = settings(
    max_examples=60, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["train", "val", "test", "path", "..", "{}"]) | st.text(max_size=5), inner,
        max_size=4,
    ), max_leaves=8,
)  # fmt: skip
LEAST = {"title": "x", "layout": "folder", "folder": "a"}
TABLE = 'folder = "."\nlayout = "table"\nsplit_file = "t.jsonl"'
KEYS = st.sampled_from(list(Spec.model_fields)) | st.text(max_size=8)
PATHS = st.text(alphabet="ab./\\:~\0\n é", max_size=8) | st.text(max_size=12)
ENTRIES = st.tuples(PATHS, st.integers(-1, 3), st.text(max_size=5)).map(list)
SPLIT_FILES = st.dictionaries(
    st.sampled_from(["train", "val", "test"]), st.lists(ENTRIES, max_size=5) | VALUES, max_size=3
)


def refusal(work: Callable[[], Any]) -> str:
    """Return why work is refused, empty where it is done; within five seconds and a gigabyte."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        work()
    except UserError as error:
        said = str(error)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
    return said


def is_one_line(said: str) -> bool:
    """Return whether a refusal, empty where there was none, is one line that can be printed."""
    return "\n" not in said and len(said) < 2000 and said == said.encode().decode()


def listed(folder: Path, rows: list[dict[str, Any]]) -> Manifest:
    """Return a dataset of the layout `table` with these rows."""
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return Manifest.load(write_manifest(folder, TABLE))


def test_what_is_right_is_taken(tmp_path: Path) -> None:
    """The refusals below are for what is wrong alone."""
    assert refusal(lambda: parse_spec(LEAST, "fuzz.toml")) == ""
    lists = {"train": [["a/b.jpg", 0, "ant"]], "test": [["c/d.jpg", 1, "bee"]]}
    assert refusal(lambda: use(coop_dataset(tmp_path, lists))) == ""
    rows = [{"path": "a/b.jpg", "label": 0, "split": "train", "class_name": "ant"}]
    assert refusal(lambda: use(listed(tmp_path, rows))) == ""


@FEW
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_content_of_a_manifest(content: dict[str, Any]) -> None:
    said = refusal(lambda: parse_spec({**LEAST, **content}, "fuzz.toml"))
    assert is_one_line(said) and is_one_line(refusal(lambda: parse_spec(content, "fuzz.toml")))
    if unknown := content.keys() - set(Spec.model_fields):
        assert said.startswith("fuzz.toml: unknown key"), unknown


@FEW
@given(text=st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_as_a_manifest(text: str, tmp_path: Path) -> None:
    path = tmp_path / "fuzz.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert is_one_line(refusal(lambda: use(Manifest.load(path))))


@FEW
@given(lists=SPLIT_FILES | VALUES)
def test_any_split_file(lists: Any, tmp_path: Path) -> None:
    assert is_one_line(refusal(lambda: use(coop_dataset(tmp_path, lists))))


@FEW
@given(rows=st.lists(st.dictionaries(
    st.sampled_from(["path", "label", "split", "caption", "class_name"]), SCALARS | PATHS,
), max_size=5))  # fmt: skip
def test_any_table(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert is_one_line(refusal(lambda: use(listed(tmp_path, rows))))
