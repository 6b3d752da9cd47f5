"""What `pip install` of the wheel gives: everything that ships, and commands that run anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, code: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a wheel in an environment of its own; dependencies come from this one."""
    pytest.importorskip("hatchling", reason="needs the extra 'dev'")
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(*pip, "wheel", *options, repository, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    bin_ = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    run(*pip, "--python", bin_ / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    paths = {"base": folder / "env", "platbase": folder / "env"}
    packages = Path(
        sysconfig.get_path("purelib", "venv", vars={k: str(v) for k, v in paths.items()})
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return bin_ / "vlmlayers"


def test_nothing_is_read_from_the_repository(installed: Path, tmp_path: Path) -> None:
    code = "import vlmlayers, vlmadapters; print(vlmlayers.__file__, vlmadapters.__file__)"
    for file in run(installed.with_name("python"), "-c", code, cwd=tmp_path).split():
        assert installed.parents[1] in Path(file).parents


def test_datasets_are_known_by_name(installed: Path, repository: Path, tmp_path: Path) -> None:
    listed = run(installed, "data", "list", cwd=tmp_path)
    for file in (repository / "data_manifests").glob("*.toml"):
        assert f"{file.stem} " in listed
    checked = run(installed, "data", "check", "caltech101", cwd=tmp_path, code=2)
    assert "caltech101: missing" in checked and "Traceback" not in checked


def test_studies_are_known_by_name(installed: Path, repository: Path, tmp_path: Path) -> None:
    said = run(installed, "study", "smal_demo", cwd=tmp_path, code=2)
    assert "did you mean 'small_demo'" in said
    said = run(installed, "study", "lost.toml", cwd=tmp_path, code=2)
    for file in (repository / "data_manifests" / "studies").glob("*.toml"):
        assert file.stem in said
    run(installed, "study", "small_demo", "--only", "extract", "--quiet", cwd=tmp_path)
    assert (tmp_path / "runs" / "small_demo" / "study.toml").is_file()


def test_published_numbers_are_there(installed: Path, tmp_path: Path) -> None:
    code = """
from vlmlayers.figures.published import published
assert len(published("base_to_novel", ".")) > 100
"""
    run(installed.with_name("python"), "-c", code, cwd=tmp_path)


def test_the_demo_runs(installed: Path, tmp_path: Path) -> None:
    run(installed, "demo", "--quiet", cwd=tmp_path)
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
