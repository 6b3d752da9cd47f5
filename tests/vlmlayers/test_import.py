"""`import vlmlayers` is quick, loads no torch, and offers what the contract names."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import vlmlayers as vl
from vlmlayers.errors import UserError


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, vlmlayers; "
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'sklearn', 'numpy')"
        " if m in sys.modules])"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "score",
        "select",
        "plots",
        "Manifest",
        "read_study",
        "metrics",
        "write_report",
        "LayerChoice",
    ],
)
def test_names_load_on_first_use_without_torch(name: str) -> None:
    code = f"import sys, vlmlayers; vlmlayers.{name}; print('torch' in sys.modules)"
    assert python(code) == "False"


def test_a_bar_loads_no_ipython_outside_of_a_notebook() -> None:
    code = (
        "import sys; from vlmlayers.progress import track; list(track([1], 'counting')); "
        "print('IPython' in sys.modules)"
    )
    assert python(code) == "False"


@pytest.mark.parametrize("package", ["vlmlayers", "vlmadapters"])
def test_a_package_has_the_version_that_is_installed(package: str) -> None:
    code = f"import sys, {package}; print({package}.__version__, 'torch' in sys.modules)"
    assert python(code) == f"{version('vlm-layers')} False"


def test_the_public_names() -> None:
    assert len(vl.__all__) <= 20 and set(vl.__all__) <= set(dir(vl))
    for name in vl.__all__:
        if name not in ("extract", "load_model", "models"):
            assert getattr(vl, name) is not None
    assert vl.UserError is UserError
    with pytest.raises(AttributeError, match="attribute lost"):
        vl.lost  # noqa: B018
