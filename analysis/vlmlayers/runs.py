"""A run folder: what a study writes, and how it was made."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlmlayers.errors import UserError, looked_for
from vlmlayers.files import checksum, file_checksum, read_json, take_lock, write_json, writing

PARTIAL = ".partial"  # ends the name of the folder of a feature store that is being written
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time in a period of so many
RUN_FILES = ("provenance.json", "stages.json", "scores.json", "report.html")
LOCK = ".lock"  # in a run folder: who writes there holds it
PACKAGES = (
    "vlm-layers", "numpy", "scipy", "scikit-learn", "pandas", "torch", "open_clip_torch", "timm",
    "pillow", "matplotlib",
)  # fmt: skip


def _inside(name: str, meaning: str) -> property:
    """Return the property that gives the path of a name inside a run folder."""
    return property(lambda run: run.folder / name, doc=meaning)


@dataclass(frozen=True)
class Run:
    """A run folder and the names in it.

    Attributes:
        folder: Where the run lies.
    """

    folder: Path

    study = _inside("study.toml", "The study file as run.")
    features = _inside("features", "Folder of the feature stores.")
    scores = _inside("scores.parquet", "The score table.")
    choice = _inside("choice.json", "The layers chosen.")
    search = _inside("search.json", "What a search on training shots picked.")
    results = _inside("results.csv", "What training reached by the protocols of the paper.")
    validation = _inside("validation.csv", "What training reached at each placement.")
    verdict = _inside("validation.json", "What the validation says of the choice.")
    figures = _inside("figures", "Folder of figures and the tables they were drawn from.")
    report = _inside("report.html", "The report.")
    provenance = _inside("provenance.json", "Versions, commit, hashes, seeds.")

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Return the run in a folder.

        Raises:
            UserError: The folder holds no score table.
        """
        run = cls(Path(folder))
        if not run.scores.exists() and not (run.folder / "scores.csv").exists():
            advice = run.names_inside() or "make one with `vlmlayers study` or `vlmlayers score`"
            if run.results.exists() or run.validation.exists():
                draw = shlex.join(["vlmlayers", "figures", str(folder), "--paper", "FOLDER"])
                advice += f", or draw what was trained with `{draw}`"
            raise UserError(
                f"{folder} is not a run folder: it holds no scores.parquet{looked_for(folder)}; "
                f"{advice}"
            )
        return run

    def names_inside(self) -> str:
        """Return, for a message, which runs lie in this folder, as of several models."""
        inside = sorted(path.parent.name for path in self.folder.glob("*/provenance.json"))
        return f"it holds the runs {', '.join(inside)}" if inside else ""

    def require_choice(self) -> None:
        """Refuse a run whose layers were not chosen yet.

        Raises:
            UserError: Names the command that chooses them.
        """
        if not self.choice.exists():
            select = shlex.join(["vlmlayers", "select", str(self.folder)])
            raise UserError(f"{self.folder} holds no choice.json; run `{select}` first")

    @property
    def left_out(self) -> dict[str, str]:
        """What could not be extracted, and why, by its name among the features."""
        return dict(self.read_provenance().get("left_out", {}))

    def stores(self) -> list[Path]:
        """Return the folders of features, without those of datasets that a study left out.

        Raises:
            UserError: There is none, or one is not finished.
        """
        folders = sorted(path for path in self.features.glob("*") if path.is_dir())
        found = [path for path in folders if path.suffix != PARTIAL]
        known = {*found, *(self.features / f"{name}{PARTIAL}" for name in self.left_out)}
        if unfinished := [path for path in folders if path not in known]:
            raise UserError(
                f"{unfinished[0]} is not finished; start its extraction again, or delete that "
                "folder to go on without its dataset"
            )
        if not found:
            streamed = self.read_provenance().get("extract", {}).get("streaming")
            raise UserError(
                f"{self.features} holds no features{looked_for(self.features)}; "
                + (
                    "they were streamed, which scored them; extract without --streaming to score "
                    "them anew"
                    if streamed
                    else "run `vlmlayers extract` first"
                )
            )
        return found

    def path_to(self, path: str) -> str:
        """Return a relative path as it is seen from the run folder.

        Empty for an absolute one, which stays as it is, and where the folder does not lie below the
        working folder: the way there would tell folders of this machine that nobody named.
        """
        here, folder = Path.cwd(), self.folder.resolve()
        if Path(path).expanduser().is_absolute() or not folder.is_relative_to(here):
            return ""
        return Path(os.path.relpath(here / path, folder)).as_posix()

    def places(self, path: str, seen: str = "") -> list[Path]:
        """Return where a recorded path may lie now: as the run folder sees it, or as it is."""
        # As the run sees it first: in another working folder the same words may lead elsewhere.
        from_run = [Path(os.path.normpath(self.folder.resolve() / seen))] if seen else []
        return list(dict.fromkeys([*from_run, Path(path).expanduser().absolute()]))

    def read(self, name: str) -> dict[str, Any]:
        """Return what a JSON file of the folder holds; empty where there is none."""
        path = self.folder / name
        return read_json(path) if path.exists() else {}

    def read_provenance(self) -> dict[str, Any]:
        """Return what is recorded of how the run was made; empty where nothing is."""
        return self.read(self.provenance.name)

    def other_weights(self, searched: dict[str, Any]) -> str:
        """Return of which weights a search is, where the run's features are of others; else empty.

        Two files of one name are told apart by their hashes, as far as both are recorded.

        Args:
            searched: What `search.json` holds.
        """
        theirs = searched.get("weights_hash")
        ours = self.read_provenance().get("model", {}).get("weights_hash", theirs)
        if theirs in (None, ours):
            return ""
        return f"{searched.get('model')} ({searched.get('weights')}, {theirs[:12]})"

    def settle(self, stage: str) -> None:
        """Forget that a stage was stopped or is outdated: a verb has done its work since."""
        ledger = self.read("stages.json")
        if stage in ledger.get("unfinished", {}) and is_first_process():
            del ledger["unfinished"][stage]
            write_json(self.folder / "stages.json", ledger)
        outdated = self.read_provenance().get("outdated", {})
        if stage in outdated:  # which the report would say of what the verb made
            self.record(outdated={key: one for key, one in outdated.items() if key != stage})

    def record(self, **parts: Any) -> None:
        """Add to `provenance.json`; of several processes the first one does."""
        if is_first_process():
            write_json(self.provenance, {**self.read_provenance(), **parts})

    def finish(self, stage: str, **parts: Any) -> None:
        """Settle a stage and record what a verb did that held no lock while it worked.

        Another process that writes the run is waited for: of two that read and write one file at a
        time, one would lose what the other added. A folder that is no run stays as it is.
        """
        if is_run(self.folder):
            with writing_alone(self.folder, wait=True):
                self.settle(stage)
                if parts and self.provenance.exists():
                    self.record(**parts)


def is_run(folder: Path) -> bool:
    """Return whether a verb has written a run, or a report of several, into a folder."""
    return any((folder / name).is_file() for name in RUN_FILES)


@contextmanager
def writing_alone(*folders: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing run folders meanwhile: two runs would be mixed in one.

    Of the processes of one torchrun, which share a run, the first one holds the folders.

    Args:
        folders: The run folders, made where absent.
        wait: Whether to wait for a process that writes one of them.

    Raises:
        UserError: Another process writes one of them, or it cannot be made.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(folders) if is_first_process() else ():
            made = not folder.exists()
            if not made and not os.access(folder, os.W_OK):
                continue  # nobody writes there, and whole results may be read
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(take_lock(folder / LOCK, folder, wait=wait))
            if made:
                held.callback(_remove_unused, folder)
        yield


def _remove_unused(folder: Path) -> None:
    """Remove a run folder into which nothing was written: it would pass for a run."""
    with suppress(OSError):
        if not holds_anything(folder):
            (folder / LOCK).unlink()
            folder.rmdir()


def holds_anything(folder: Path) -> bool:
    """Return whether a run folder holds more than its lock."""
    return any(path.name != LOCK for path in folder.glob("*"))


def score_table(source: str | Path) -> Path:
    """Return the file of a score table: the source, or what its run folder holds.

    Raises:
        UserError: There is none.
    """
    path = Path(source)
    if path.is_dir():
        path = path / ("scores.parquet" if (path / "scores.parquet").exists() else "scores.csv")
    if not path.exists():
        raise UserError(f"{path} does not exist{looked_for(path)}; run `vlmlayers score` first")
    return path


def is_first_process() -> bool:
    """Return whether this process writes tables: the only one, or the first that torchrun made."""
    return os.environ.get("RANK", "0") == "0"


def processes_launched() -> int:
    """Return how many processes torchrun started, 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def fingerprint(content: Any) -> str:
    """Return sixteen hexadecimal digits that change with any part of JSON-like content."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return checksum(text)[:16]


def file_mark(path: Path) -> str:
    """Return sixteen hexadecimal digits of a file's SHA-256; empty where there is no file."""
    return file_checksum(path)[:16] if path.is_file() else ""


def environment() -> dict[str, Any]:
    """Return versions, machine and commit."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "commit": commit(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@lru_cache(maxsize=1)
def processor() -> str:
    """Return the name of this machine's processor, or else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Return how many processor cores this process may use: its affinity, its container's quota."""
    known = hasattr(os, "sched_getaffinity")
    found = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    try:
        # A container's quota bounds the work, not the number of cores that it sees.
        quota, period = QUOTA.read_text(encoding="utf-8").split()[:2]
        return max(1, min(found, int(quota) // int(period)))
    except (OSError, ValueError):  # no container, or one without a quota ("max")
        return found


def versions() -> dict[str, str]:
    """Return the versions of the packages that values depend on, without importing them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_kind(device: str) -> str:
    """Return the kind of device that a name stands for here: `auto` is `cuda` or `cpu`.

    The driver is asked, so that a study in which nothing changed says so without importing torch.
    """
    return ("cuda" if _gpus() else "cpu") if device == "auto" else device.partition(":")[0]


@lru_cache(maxsize=1)
def _gpus() -> int:
    """Return how many GPUs the driver lets this process see, and torch was built for."""
    if version("torch").endswith("+cpu"):
        return 0
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):  # no driver, no GPU
        return 0
    return 0 if failed else count.value


@lru_cache(maxsize=1)
def commit() -> str:
    """Return the commit of this package's repository, with `+changes`; empty outside of one."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # An installed package may lie inside somebody else's repository, whose commit says nothing.
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        head = git("rev-parse", "HEAD") if tracked else ""
        changed = head and git("status", "--porcelain", "--untracked-files=no", str(here))
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+changes" if changed else "")
