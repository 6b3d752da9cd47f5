"""The site: every module is on it, every link leads somewhere, nothing is loaded from afar."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def builder(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", repository / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_build"] = module
    spec.loader.exec_module(module)
    return module


class Links(HTMLParser):
    """Collect what a page links to and loads, and the anchors it offers."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        for key in ("src", "href"):
            if tag in ("script", "link", "img", "iframe") and values.get(key):
                self.loaded.append(values[key])


def read(page: Path) -> Links:
    parser = Links()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


@pytest.fixture
def little_docs(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    (docs / "how").mkdir(parents=True)
    (docs / "style.css").write_text("body {}")
    (tmp_path / "CONTRIBUTING.md").write_text("# Contributing\n\n[guide](docs/guide.md)")
    (docs / "picture.png").write_bytes(b"png")
    (tmp_path / "README.md").write_text(
        "# The `toolkit`\n\n[guide](docs/guide.md#second-part) [licence](LICENSE) "
        "![picture](docs/picture.png) [far](https://example.org/a)\n\n"
        "| a | b |\n|---|---|\n| 1 | <x> |\n"
    )
    (docs / "guide.md").write_text(
        "# From zero\n\n[metric](how/metric.md)\n\n## Second part\n\n```python\na = {'b': 1}\n```\n"
    )
    (docs / "how" / "metric.md").write_text(
        "# Add a metric\n\n[back](../guide.md) [home](../../README.md)"
    )
    return docs


def test_guide_pages_are_rendered_and_linked(
    builder: ModuleType, little_docs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "site"
    pages = builder.build(little_docs, out, packages=())
    assert sorted(page.relative_to(out).as_posix() for page in pages) == [
        "contributing.html", "guide.html", "how/metric.html", "index.html",
    ]  # fmt: skip
    index = (out / "index.html").read_text()
    assert "<title>The toolkit</title>" in index
    assert "<td>1</td>" in index
    assert "guide.html#second-part" in read(out / "index.html").links
    assert "second-part" in read(out / "guide.html").ids
    assert "LICENSE" not in index, "a link to a file that is not on the site must lose its target"
    assert "https://example.org/a" in read(out / "index.html").links
    assert (out / "picture.png").read_bytes() == b"png"
    assert '<a href="index.html" aria-current="page">Start</a>' in index
    assert "guide.html" in read(out / "contributing.html").links
    deep = read(out / "how" / "metric.html")
    assert {"../guide.html", "../index.html"} <= set(deep.links)
    assert "../style.css" in deep.loaded


def test_the_page_of_metrics_holds_every_declaration(builder: ModuleType) -> None:
    from vlmlayers.metrics import METRICS

    page = builder.list_metrics()
    assert re.findall(r'<tr id="(\w+)">', page) == sorted(
        METRICS, key=lambda name: list(dict.fromkeys(m.level for m in METRICS.values())).index(
            METRICS[name].level)
    )  # fmt: skip
    row = page.split('<tr id="silhouette">')[1].split("</tr>")[0]
    for fact in ("shuffled labels", "range -1 … 1", "n ≥ 6", "Rousseeuw 1987", "rotation"):
        assert fact in row


def test_a_folder_that_is_no_site_is_not_replaced(
    builder: ModuleType, little_docs: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    with pytest.raises(RuntimeError, match="not a site built by this script"):
        builder.build(little_docs, tmp_path, packages=())
    assert precious.exists()


def test_a_module_that_cannot_be_imported_fails_the_build(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "halfdone"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(builder, "PACKAGES", ("halfdone",))
    with pytest.raises(RuntimeError, match=r"halfdone\.broken"):
        builder.build_reference(tmp_path / "api", ("halfdone",))


@pytest.mark.slow
def test_the_site_of_this_repository(repository: Path, tmp_path: Path) -> None:
    """Built offline by the command; every local link and anchor of every page resolves."""
    site = tmp_path / "site"
    command = [sys.executable, repository / "docs" / "build.py", "--out", site]
    subprocess.run(command, check=True, capture_output=True, text=True)
    pages = {path.resolve(): read(path) for path in site.rglob("*.html")}
    for source in ("analysis/vlmlayers", "adapters/vlmadapters"):
        for module in (repository / source).rglob("*.py"):
            parts = module.relative_to(repository / source).with_suffix("").parts
            if any(part.startswith("_") for part in parts):
                continue
            page = site / "api" / Path(source).name / Path(*parts).with_suffix(".html")
            assert page.exists(), f"{module} is not in the API reference"
    for path, page in pages.items():
        for link in page.loaded:
            assert not re.match(r"(https?:)?//", link), f"{path.name} loads {link}"
        for link in page.links:
            file, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", file):
                continue
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path.name} links to {link}, which is not there"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{path.name} links to {link}: no such place"
