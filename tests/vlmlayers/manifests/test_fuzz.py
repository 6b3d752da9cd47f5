"""Hostile manifests and lists: whatever they hold, the answer is data or one line of refusal."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_fixtures import coop_dataset, write_manifest
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
KEYS = st.sampled_from(list(Spec.model_fields)) | st.text(max_size=8)
PATHS = st.text(alphabet="ab./\\:~\0\n é", max_size=8) | st.text(max_size=12)
ENTRIES = st.tuples(PATHS, st.integers(-1, 3), st.text(max_size=5)).map(list)
SPLIT_FILES = st.dictionaries(
    st.sampled_from(["train", "val", "test"]), st.lists(ENTRIES, max_size=5) | VALUES, max_size=3
)


def answers(work: Callable[[], Any]) -> None:
    """Run; a refusal must be one printable line; nothing takes five seconds or a gigabyte."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        work()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        str(error).encode()
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


def use(manifest: Manifest) -> None:
    """Do with a manifest what the toolkit does; every path must stay inside."""
    root = manifest.place().images
    for split in manifest.splits():
        for item in manifest.items(split):
            assert item.label < len(manifest.class_names())
            assert manifest.location(item).resolve().is_relative_to(root.resolve())
            manifest.prompt(item.class_name).encode()
    manifest.check().line().encode()
    assert "<script" not in manifest._repr_html_()


@FEW
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_content_of_a_manifest(content: dict[str, Any]) -> None:
    base = {"title": "x", "layout": "folder", "folder": "a"}
    answers(lambda: parse_spec({**base, **content}, "fuzz.toml"))
    answers(lambda: parse_spec(content, "fuzz.toml"))


@FEW
@given(text=st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_as_a_manifest(text: str, tmp_path: Path) -> None:
    path = tmp_path / "fuzz.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    answers(lambda: use(Manifest.load(path)))


@FEW
@given(lists=SPLIT_FILES | VALUES)
def test_any_split_file(lists: Any, tmp_path: Path) -> None:
    answers(lambda: use(coop_dataset(tmp_path, lists)))


@FEW
@given(rows=st.lists(st.dictionaries(
    st.sampled_from(["path", "label", "split", "caption", "class_name"]), SCALARS | PATHS,
), max_size=5))  # fmt: skip
def test_any_table(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    text = 'folder = "."\nlayout = "table"\nsplit_file = "t.jsonl"'
    answers(lambda: use(Manifest.load(write_manifest(tmp_path, text))))
