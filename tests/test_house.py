"""The house rules: what files promise about each other, and what an import costs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TOOLS = ("dev", "docs")  # extras of those who work on the project
TEXT_FILES = {".py", ".toml", ".md", ".yml", ".txt", ".cff", ".ipynb", ".j2", ".csv", ".json", ""}


def _pyproject(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def _name(requirement: str) -> str:
    return re.split(r"[><=\[ ]", requirement)[0].lower().replace("_", "-")


def test_environment_yml_has_the_bounds_of_pyproject(repository: Path) -> None:
    project = _pyproject(repository)["project"]
    declared = {*project["dependencies"], *project["optional-dependencies"]["notebooks"]}
    lines = (repository / "environment.yml").read_text().splitlines()
    found = {m[1] for line in lines if (m := re.match(r"^ +- ([^-\s]\S*>=\S+)$", line))}
    listed = {line.replace("pytorch>=", "torch>=") for line in found} - {"python>=3.11"}
    assert listed == declared


# What uv and conda's solvers say of an index out of reach, and of no package.
OFFLINE = "error sending request|dns error|CONNECTION FAILED|resolve host|Timeout was reached"


def _uv() -> str | None:
    return shutil.which("uv", path=f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}")


def _refusal(command: list[str], folder: Path) -> str:
    """Return why a solver finds no versions, nothing where it does; skip without an index."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode and re.search(OFFLINE, done.stderr):
        pytest.skip("no package index can be reached")
    return done.stderr or "no reason given" if done.returncode else ""


@pytest.mark.slow
def test_environment_yml_can_be_made(repository: Path, tmp_path: Path) -> None:
    """By a solver of conda where there is one, else by what pip would take in each one's place."""
    file = repository / "environment.yml"
    if solver := next(filter(None, map(shutil.which, ("micromamba", "mamba", "conda"))), None):
        verb = ["create", "--name", "tried"] if "micromamba" in solver else ["env", "create"]
        command = [solver, *verb, "--yes", "--dry-run", "--file", str(file)]
    elif uv := _uv():
        named = re.findall(r"^ +- ([^-\s]\S*>=\S+)$", file.read_text(), re.MULTILINE)
        lines = [name.replace("pytorch>=", "torch>=") for name in named if "python>=" not in name]
        (tmp_path / "named.txt").write_text("\n".join(lines))
        command = [uv, "pip", "compile", "--quiet", "named.txt", "--output-file", "found.txt"]
        command += ["--constraint", str(repository / "constraints.txt")]
    else:
        pytest.skip("neither micromamba, mamba, conda nor uv is installed")
    assert _refusal(command, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11.0", "3.13.0"])
def test_the_pinned_versions_install_on_every_python(
    repository: Path, tmp_path: Path, python: str
) -> None:
    """A pinned package may ask for a later patch release than the one at hand here."""
    if not (uv := _uv()):
        pytest.skip("uv is not installed")
    command = [uv, "pip", "compile", "--quiet", "--python-version", python, "--all-extras"]
    command += ["--constraint", "constraints.txt", "pyproject.toml"]
    assert _refusal([*command, "--output-file", str(tmp_path / "found.txt")], repository) == ""


def test_every_dependency_has_a_lower_bound_and_a_pinned_version(repository: Path) -> None:
    project = _pyproject(repository)["project"]
    extras = project["optional-dependencies"]
    pinned = {
        _name(line): line.split("==")[1]
        for line in (repository / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    shipped = ("notebooks", "hf", "peft", "shards", "datasets")
    required = [*project["dependencies"], *(r for name in shipped for r in extras[name])]
    for requirement in required:
        assert ">=" in requirement, requirement
        assert _name(requirement) in pinned, f"{requirement} is not in constraints.txt"


def _imported(repository: Path, *folders: str) -> set[str]:
    """Return the top names that the files of some folders import."""
    found = set()
    for folder in folders:
        for path in (repository / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return found


MODULES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "lazy-loader": "lazy_loader",
    "open-clip-torch": "open_clip",
    "huggingface-hub": "huggingface_hub",
    "umap-learn": "umap",
}
# Run by users, or imported by libraries where it is installed: tqdm's bars in a notebook, Altair.
UNIMPORTED = {"jupyterlab", "ipywidgets", "vl-convert-python"}


def _declared(repository: Path) -> set[str]:
    """Return the top names of what users install: all but the tools of development."""
    project = _pyproject(repository)["project"]
    extras = project["optional-dependencies"]
    shipped = [r for name, listed in extras.items() if name not in TOOLS for r in listed]
    names = map(_name, (*project["dependencies"], *shipped))
    return {MODULES.get(name, name) for name in names} - UNIMPORTED


def test_every_declared_dependency_is_imported_by_what_users_run(repository: Path) -> None:
    used = _imported(repository, "analysis", "adapters")
    for path in (repository / "notebooks").glob("*.ipynb"):
        used |= set(re.findall(r"^ *\"(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    assert _declared(repository) - used == set(), "nothing may idle"


def test_every_import_is_declared(repository: Path) -> None:
    used = _imported(repository, "analysis", "adapters") - set(sys.stdlib_module_names)
    parts = {"pydantic_core", "markupsafe"}  # of pydantic and jinja2, which pin them
    assert used - {"vlmlayers", "vlmadapters"} - parts <= _declared(repository)


def test_constraints_name_no_address(repository: Path) -> None:
    text = (repository / "constraints.txt").read_text()
    assert "://" not in text.split("\n", 1)[1]
    assert "file:" not in text


@pytest.mark.parametrize("module", ["vlmlayers", "vlmlayers.plots", "vlmlayers.cli"])
def test_import_leaves_torch_alone(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_imports_keep_their_rules(repository: Path) -> None:
    pytest.importorskip("importlinter", reason="needs the extra 'dev'")
    code = "import importlinter.cli as c; raise SystemExit(c.lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_public_surface_is_small() -> None:
    import vlmadapters
    import vlmlayers

    assert len(vlmlayers.__all__) <= 20 and sorted(vlmlayers.__all__) == dir(vlmlayers)
    assert len(vlmadapters.__all__) <= 12 and sorted(vlmadapters.__all__) == dir(vlmadapters)


def test_no_machine_path_is_committed(repository: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    here = "/" + "work" + "/"
    offenders = [
        name
        for name in listed
        if name
        and Path(name).suffix in TEXT_FILES
        and here in (repository / name).read_text(errors="ignore")
    ]
    assert offenders == []


def test_each_class_name_means_one_thing(repository: Path) -> None:
    found: dict[str, list[str]] = {}
    for path in sorted(
        p for root in ("analysis", "adapters") for p in repository.glob(f"{root}/**/*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(repository)))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_every_method_has_a_page(repository: Path) -> None:
    from vlmadapters.methods import BUILT_IN

    pages = {path.stem for path in (repository / "docs" / "methods").glob("*.md")}
    trained = set(BUILT_IN) - {"zero-shot"}
    assert {"tip" if name == "tip-f" else name for name in trained} == pages
