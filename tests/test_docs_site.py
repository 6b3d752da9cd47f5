"""The site: everything is on it, every link leads somewhere, nothing is loaded from afar."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
from browser import CHROMIUM, chromium


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
def pages_of_code(repository: Path) -> ModuleType:
    path = repository / "docs" / "reference_pages.py"
    spec = importlib.util.spec_from_file_location("reference_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_code_of_the_gallery_runs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("MPLBACKEND", "agg")
    page = (repository / "docs" / "gallery.md").read_text(encoding="utf-8")
    cells = re.findall(r"```\{code-cell\} ipython3\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "docs/gallery.md", "exec"), names)
    assert len(cells) > 10


def test_each_metric_has_a_page_that_holds_its_declaration(
    pages_of_code: ModuleType, tmp_path: Path
) -> None:
    from vlmlayers.metrics import METRICS

    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "of_old.md").touch()
    pages_of_code.write_metrics(tmp_path / "metrics")
    written = {path.stem for path in (tmp_path / "metrics").glob("*.md")}
    assert written == {*METRICS, "index"}
    page = (tmp_path / "metrics" / "silhouette.md").read_text()
    for fact in ("shuffled labels", "-1 … 1", "Rousseeuw 1987", "rotation", "| fewest | 6 |"):
        assert fact in page
    index = (tmp_path / "metrics" / "index.md").read_text()
    assert all(f"]({name}.md)" in index for name in METRICS)


def test_the_glossary_holds_the_words_of_reports(pages_of_code: ModuleType, tmp_path: Path) -> None:
    from vlmlayers.report.glossary import GLOSSARY

    pages_of_code.write_glossary(tmp_path / "deep" / "glossary.md")
    text = (tmp_path / "deep" / "glossary.md").read_text()
    assert all(f"\n{term}\n  {meaning}\n" in text for term, meaning in GLOSSARY.items())


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, but for outputs of notebooks, which have a test."""
    pytest.importorskip("sphinx", reason="needs the extra 'docs'")
    out = tmp_path_factory.mktemp("site")
    report = out / "extra" / "report.html"
    report.parent.mkdir()
    report.write_text("<!doctype html><title>Report</title>")
    options = ["-D", "nb_execution_mode=off", "-D", f"html_extra_path={report.parent}"]
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", *options]
    done = subprocess.run(
        [*command, ".", str(out / "html")], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return out / "html"


@pytest.mark.slow
def test_every_link_and_module_is_there_and_nothing_is_from_afar(
    site: Path, repository: Path
) -> None:
    pages = {path.resolve(): read(path) for path in site.rglob("*.html")}
    for source in ("analysis/vlmlayers", "adapters/vlmadapters"):
        for module in (repository / source).rglob("*.py"):
            parts = module.relative_to((repository / source).parent).with_suffix("").parts
            if any(part.startswith("_") for part in parts):
                continue
            page = site / "docs" / "reference" / parts[0] / f"{'.'.join(parts)}.html"
            assert page.exists(), f"{module} is not in the API reference"
    for path, page in pages.items():
        for link in page.loaded:
            assert not re.match(r"(https?:)?//", link), f"{path.name} loads {link}"
        for link in page.links:
            file, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", file):
                continue
            target = (path.parent / unquote(file)).resolve() if file else path
            assert target.exists(), f"{path.name} links to {link}, which is not there"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{path.name} links to {link}: no such place"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )['\"]?(?:https?:)?//", style.read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")
@pytest.mark.parametrize("width", [1400, 390])
def test_pages_open_from_the_disk_without_a_request_and_without_a_bar_below(
    site: Path, tmp_path: Path, width: int
) -> None:
    pytest.importorskip("websocket", reason="needs websocket-client, which jupyterlab brings")
    with chromium(tmp_path) as tab:
        for name in ("index", "guide", "howto/lora", "reference/metrics/silhouette", "gallery"):
            tab.open(site / "docs" / f"{name}.html", width)
            assert tab.errors() == []
            assert tab.run("Boolean(document.querySelector('.search-button, [type=search]'))")
            assert tab.run("document.documentElement.scrollWidth") <= width, name
        tab.open(site / "search.html", width)
        tab.run("location.search = '?q=silhouette'")
        tab.until("document.querySelectorAll('#search-results li').length > 0")
        assert all(address.startswith("file:") for address in tab.requests())
