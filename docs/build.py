"""Build the static site: the guide pages of docs/ and the API reference from the docstrings.

    python docs/build.py [--out site]

Needs no network. The site opens from the disk: no page loads anything from elsewhere.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import markdown2
import pdoc
import pdoc.render
from pygments.formatters import HtmlFormatter

DOCS = Path(__file__).resolve().parent
PACKAGES = ("vlmlayers", "vlmadapters")
EXTRAS = ["fenced-code-blocks", "tables", "header-ids", "code-friendly", "cuddled-lists", "strike"]
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages that lie where repositories have them
KEPT = {".png", ".svg", ".jpg", ".toml", ".csv", ".pdf"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><link rel="stylesheet" href="{up}style.css">
</head><body><a class="skip" href="#content">Skip to the text</a><div class="page">
<nav aria-label="Site"><strong><a href="{up}index.html">vlm-layers</a></strong>
{menu}
</nav><main id="content">
{body}
</main></div></body></html>
"""


@dataclass(frozen=True)
class Page:
    """One guide page.

    Attributes:
        source: The Markdown file.
        target: Path of the page inside the site, such as `guide.html`.
        title: Its first heading.
    """

    source: Path
    target: str
    title: str

    @classmethod
    def of(cls, source: Path, target: str) -> Page:
        """Read the title of a Markdown file."""
        heading = re.search(r"^# +(.+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
        title = heading.group(1) if heading else source.stem.replace("_", " ").capitalize()
        return cls(source, target, title.replace("`", ""))


def find_pages(docs: Path) -> list[Page]:
    """Return the pages in the order of the menu: the README, docs/*.md, the rest of `BESIDE`."""
    start = next((path for path in (docs / "index.md", docs.parent / "README.md")
                  if path.exists()), None)  # fmt: skip
    first = [Page.of(start, "index.html")] if start else []
    rest = [path for path in sorted(docs.rglob("*.md")) if path != start]
    beside = [docs.parent / name for name in BESIDE]
    return [
        *first,
        *(Page.of(path, _target(path, docs)) for path in rest),
        *(Page.of(path, f"{path.stem.lower()}.html") for path in beside if path.exists()),
    ]


def build(docs: Path, out: Path, packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    """Write the site into the folder `out`, which is replaced; return the guide pages written.

    Raises:
        RuntimeError: A module could not be imported, or `out` holds something else than a site.
    """
    if out.exists() and any(out.iterdir()) and not (out / "api").is_dir():
        raise RuntimeError(f"{out} is not a site built by this script; name another folder")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    pages = find_pages(docs)
    (out / "api").mkdir()
    if packages:
        build_reference(out / "api", packages)
        overview = render("All modules", list_modules(packages), "api/index.html", pages, packages)
        (out / "api" / "index.html").write_text(overview, encoding="utf-8")
        listed = render("All metrics", list_metrics(), "api/metrics.html", pages, packages)
        (out / "api" / "metrics.html").write_text(listed, encoding="utf-8")
    for path in docs.rglob("*"):
        if path.suffix in KEPT:
            _copy(path, out / path.relative_to(docs))
    colours = HtmlFormatter(style="friendly").get_style_defs(".codehilite")
    style = (docs / "style.css").read_text(encoding="utf-8")
    style += f"@media (prefers-color-scheme: light) {{\n{colours}\n}}\n"
    (out / "style.css").write_text(style, encoding="utf-8")
    if not any(page.target == "index.html" for page in pages):
        (out / "index.html").write_text(render("vlm-layers", "<h1>vlm-layers</h1>", "index.html",
                                               pages, packages), encoding="utf-8")  # fmt: skip
    written = []
    for page in pages:
        body = markdown2.markdown(page.source.read_text(encoding="utf-8"), extras=EXTRAS)
        body = _mend_links(str(body), page, pages, docs, out)
        path = out / page.target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(page.title, body, page.target, pages, packages), encoding="utf-8")
        written.append(path)
    return written


def build_reference(out: Path, packages: tuple[str, ...]) -> None:
    """Write the API reference of the packages from their docstrings."""
    pdoc.render.configure(
        docformat="google", footer_text="vlm-layers", show_source=True, search=True
    )
    modules = find_modules(packages)
    for name in modules:
        resolve_names(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*modules, output_directory=out)
    faults = [str(warning.message) for warning in caught if _is_fault(warning)]
    if faults:
        raise RuntimeError("the API reference is incomplete:\n" + "\n".join(faults))


def resolve_names(name: str) -> None:
    """Import the public names that a module imports on first use; pdoc reads only its dictionary.

    Raises:
        RuntimeError: The module or one of its names cannot be imported.
    """
    try:
        module = import_module(name)
        vars(module).update(
            {word: getattr(module, word) for word in vars(module).get("__all__", ())}
        )
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{name} cannot be documented: {error}") from error


def list_modules(packages: tuple[str, ...]) -> str:
    """Return a table of all modules with the first sentence of their docstrings."""
    rows = []
    for name in find_modules(packages):
        words = (import_module(name).__doc__ or "").strip().split("\n\n")[0]
        link = f'<a href="{name.replace(".", "/")}.html"><code>{name}</code></a>'
        rows.append(f"<tr><td>{link}</td><td>{_code(words)}</td></tr>")
    return "<h1>All modules</h1>\n<table>\n" + "\n".join(rows) + "\n</table>"


def list_metrics() -> str:
    """Return what the METRICS table declares, one table for each level."""
    from vlmlayers.metrics import table

    parts = ["<h1>All metrics</h1>"]
    for level, rows in table().groupby("level", sort=False):
        lines = [_metric_row({key: _code(value) for key, value in row.items()})
                 for row in rows.to_dict("records")]  # fmt: skip
        heads = "".join(f"<th>{words}</th>" for words in ("Metric", "Value", "Chance", "Holds for"))
        parts.append(f"<h2>{str(level).capitalize()}</h2>\n<table>\n<tr>{heads}</tr>")
        parts += [*lines, "</table>"]
    return "\n".join(parts)


def _metric_row(row: dict[str, str]) -> str:
    cells = (
        f"<code>{row['metric']}</code><br>{row['axis label']}",
        f"{row['meaning']}<br>Larger: {row['larger means']}; range {row['bounds']}. "
        f"{row['reference']}.",
        row["chance"] or "not defined",
        f"{row['needs']}; {row['towers']}; {row['spaces']}; n ≥ {row['smallest n']}"
        + (f"; unchanged by {row['invariant to']}" if row["invariant to"] else "")
        + (f"; changed by {row['sensitive to']}" if row["sensitive to"] else ""),
    )
    return f'<tr id="{row["metric"]}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _code(words: object) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(str(words)))


def find_modules(packages: tuple[str, ...]) -> list[str]:
    """Return every module of the packages, also those that an `__all__` leaves out."""
    found = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        homes = list(spec.submodule_search_locations or []) if spec else []
        files = sorted(path for home in homes for path in Path(home).rglob("*.py"))
        parts = [(package, *path.relative_to(homes[0]).with_suffix("").parts) for path in files]
        names = [".".join(name).removesuffix(".__init__") for name in parts]
        found += [name for name in sorted(names) if "._" not in name] or [package]
    return found


def render(title: str, body: str, target: str, pages: list[Page], packages: tuple[str, ...]) -> str:
    """Return a whole page: menu and body."""
    up = "../" * target.count("/")
    guide = [(p.target, "Start" if p.target == "index.html" else p.title) for p in pages]
    api = [(f"api/{package.replace('.', '/')}.html", package) for package in packages]
    api += [("api/index.html", "All modules"), ("api/metrics.html", "All metrics")] if api else []
    menu = "\n".join(
        f"<h2>{heading}</h2><ul>"
        + "".join(_menu_line(up, to, words, to == target) for to, words in entries)
        + "</ul>"
        for heading, entries in (("Guide", guide), ("Reference", api)) if entries
    )  # fmt: skip
    return PAGE.format(title=html.escape(title), up=up, menu=menu, body=body)


def _menu_line(up: str, target: str, words: str, current: bool) -> str:
    mark = ' aria-current="page"' if current else ""
    return f'<li><a href="{up}{target}"{mark}>{html.escape(words)}</a></li>'


def _target(path: Path, docs: Path) -> str:
    return path.relative_to(docs).with_suffix(".html").as_posix()


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def _is_fault(warning: warnings.WarningMessage) -> bool:
    """Tell a warning of pdoc about our code from those of the libraries we import."""
    words = str(warning.message)
    faults = ("Couldn't import", "Found ", "Error parsing", "Failed to run")
    return words.startswith(faults) and any(package in words for package in PACKAGES)


def _mend_links(body: str, page: Page, pages: list[Page], docs: Path, out: Path) -> str:
    """Point links at the built pages; a link to a file that is not on the site loses its target."""
    built = {built.source.resolve(): built.target for built in pages}
    up = "../" * page.target.count("/")

    def mend(match: re.Match[str]) -> str:
        attribute, link = match.groups()
        file, hash_, anchor = link.partition("#")
        if not file or re.match(r"[a-z]+:", file):
            return match.group(0)
        source = (page.source.parent / file).resolve()
        if source in built:
            return f'{attribute}="{up}{built[source]}{hash_}{anchor}"'
        if source.suffix in KEPT and source.is_file():
            inside = source.relative_to(docs) if source.is_relative_to(docs) else Path(source.name)
            _copy(source, out / inside)
            return f'{attribute}="{up}{inside.as_posix()}"'
        return ""

    return re.sub(r'\b(href|src)="([^"]*)"', mend, body)


def main() -> int:
    """Build the site; return the exit code."""
    parser = argparse.ArgumentParser(description="Build the static site.")
    parser.add_argument("--out", type=Path, default=DOCS.parent / "site")
    out = parser.parse_args().out
    pages = build(DOCS, out)
    sys.stdout.write(f"{out / 'index.html'}: {len(pages)} guide pages and the API reference\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
