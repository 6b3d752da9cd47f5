"""How Sphinx builds the site, from the root of the repository: `make docs`.

Sources stay where repositories have them, so that a link holds there and on the site. The site
opens from the disk: no page loads anything from elsewhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from reference_pages import write_glossary, write_metrics  # noqa: E402

project = "vlm-layers"
author = "The vlm-layers developers"
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "figures/tables/*.md",
    "benchmarks/registered_search.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".*", "runs", "site"]

extensions = ["myst_nb", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
suppress_warnings = ["ref.python"]  # a name that a package hands on has two homes
myst_heading_anchors = 3

default_role = "code"  # docstrings put code between single backticks
napoleon_use_ivar = True  # fields of a dataclass are described once
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "ignore-module-all": True}  # each name in its own home
apidoc_modules = [
    {"path": f"../{root}/{package}", "destination": f"docs/reference/{package}",
     "separate_modules": True, "module_first": True}
    for root, package in (("analysis", "vlmlayers"), ("adapters", "vlmadapters"))
]  # fmt: skip

nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 170
nb_ipywidgets_js = {}  # its default comes from a network
nb_merge_streams = True

html_theme = "pydata_sphinx_theme"
html_title = "vlm-layers"
html_favicon = None
html_show_sourcelink = False
html_static_path = ["images"]
html_extra_path = ["../runs/demo/report.html"]
html_additional_pages = {"index": "to_start.html"}
html_sidebars = {"docs/index": []}
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": False,
    "header_links_before_dropdown": 6,
}
templates_path = ["templates"]

write_metrics(HERE / "reference" / "metrics")
write_glossary(HERE / "reference" / "glossary.md")


def show_formulas(_app: object, _what: str, _name: str, _object: object, _options: object,
                  lines: list[str]) -> None:  # fmt: skip
    """Keep what a docstring indents as it stands; as reStructuredText it would be a quotation."""
    text = re.sub(r"(?m)^(\S.*\n)\n(?= {4}\S)", r"\1\n::\n\n", "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app: object) -> None:
    """Read docstrings before Napoleon does."""
    app.connect("autodoc-process-docstring", show_formulas, priority=400)  # type: ignore[attr-defined]
