"""Files that appear whole or not at all, checksums, locks, and a model folder's weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from threading import get_native_id
from typing import IO, TYPE_CHECKING, Any
from weakref import WeakSet

from vlmlayers.errors import DISK, UserError, WriteFault, first_cause, looked_for, one_line
from vlmlayers.progress import say

if TYPE_CHECKING:
    import pandas as pd

try:
    import fcntl
except ImportError:  # not on Windows, where two processes on one folder are not told apart
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
NAMES = ("model", "weights", "dataset", "source", "method", "placement")  # columns of tables
MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "None"]  # numbers that are not there
# Names that open_clip, timm and Hugging Face save weights under, in the order they are looked for.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
HUB = "hf-hub:"  # before the name of a repository of the Hugging Face hub
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
DRAFTS = "*.part"  # what a process that was killed while it wrote leaves behind
_LOCKS: WeakSet[IO[bytes]] = WeakSet()  # those that this process holds or held


def atomically(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file so that a crash leaves the old content or the new, never a part.

    Drafts of this file that killed processes of this machine left behind are removed.

    Args:
        path: The file; its folder is made where absent.
        write: Writes the file that it is handed, which is renamed when complete.

    Raises:
        UserError: The file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_drafts(path)
        # In the same folder: a rename is atomic within one file system only.
        part = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{get_native_id()}.part")
        try:
            write(part)
            # A rename may reach the disk before the content, and a power cut leave an empty file.
            with part.open("rb+") as handle:
                os.fsync(handle.fileno())
            size = part.stat().st_size
            part.replace(path)
            LOG.debug("wrote %s (%s bytes)", path, f"{size:,}")
        finally:
            part.unlink(missing_ok=True)
    return path


@cache
def _machine() -> str:
    """Return eight digits of what numbers this process: the machine, or a container on it."""
    # Machines that share files may bear one name. Containers number their processes anew.
    start, numbering = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    told = [start.read_text(encoding="utf-8") if start.exists() else platform.node()]
    told += [str(numbering.stat().st_ino)] if numbering.exists() else []
    return checksum(" ".join(told))[:8]


def _remove_drafts(path: Path) -> None:
    """Remove the drafts of a file whose processes ran on this machine and are gone.

    Those of other machines stay: nobody here can tell whether they are still being written.
    """
    for draft in path.parent.glob(f".{escape(path.name)}.{_machine()}-*-*.part"):
        if not _runs(int(draft.name.split("-")[-2])):
            with suppress(OSError):  # another process may be as quick
                draft.unlink()


def _runs(process: int) -> bool:
    """Return whether a process of this machine is there; always where that cannot be asked."""
    if fcntl is None:  # on Windows the question below would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def write_text(path: Path, text: str) -> Path:
    """Write a text file as UTF-8, whole or not at all; see `atomically` for errors."""
    return atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def files_beside(base: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those that name a file in a folder as its path; others as they are."""
    found = {key: base / one for key, one in values.items() if isinstance(one, str)}
    # Path.is_file fails on texts that no path can be, such as a long one.
    there = {key: str(path) for key, path in found.items() if os.path.isfile(path)}  # noqa: PTH113
    return {**values, **there}


def read_json(
    path: Path, what: str = "", advice: str = "delete it and run the stage again"
) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        path: The file.
        what: What it is, for messages, such as "the choice".
        advice: What to do where it is wrong.

    Raises:
        UserError: It cannot be read, is not JSON, or holds no object.
    """
    content = _parsed(path, json.loads, "JSON", what, advice)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object; {advice}")
    return content


def read_toml(path: Path, what: str = "") -> dict[str, Any]:
    """Return the content of a TOML file; see `read_json` for arguments and errors."""
    return _parsed(path, tomllib.loads, "TOML", what)


def _parsed(path: Path, parse: Callable[[str], Any], kind: str, what: str, advice: str = "") -> Any:
    then = f"; {advice}" if advice else ""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        name = f"{what} {path}".strip()
        where = looked_for(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read {name}: {error.strerror}{where}{then}") from None
    # Both parsers call themselves for what is nested: some kilobytes of brackets end in that.
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise UserError(f"{path} is not valid {kind}: {why}{then}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON file that appears whole or not at all."""
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> Path:
    """Write a table without its index, whole or not at all; see `atomically` for errors."""
    # The same line ends on every system, so that recorded tables compare byte by byte.
    return atomically(path, lambda part: table.to_csv(part, index=False, lineterminator="\n"))


def read_csv(path: Path, text: Iterable[str] = NAMES) -> pd.DataFrame:
    """Read a table of which some columns are text: only what is empty is missing there.

    Left to pandas, a class called "NA" would be missing, and the dataset "007" or the placement
    "9" a number.
    """
    import pandas as pd

    columns = set(pd.read_csv(path, nrows=0).columns)
    names = columns & set(text)
    missing = dict.fromkeys(columns, MISSING) | {key: [""] for key in names}
    kinds = dict.fromkeys(names, "object")
    return pd.read_csv(path, dtype=kinds, na_values=missing, keep_default_na=False)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into one line for the user.

    Raises:
        WriteFault: Names the path, the reason, and that the work so far is kept.
    """
    try:
        yield
    except OSError as error:
        advice = DISK.get(error.errno or 0, "choose a folder that can be written")
        # Arrow gives the number alone, and a message that names our draft.
        reason = error.strerror or (os.strerror(error.errno) if error.errno else error)
        raise WriteFault(
            f"cannot write {path}: {reason}; {advice} and start again, what is done so far is kept"
        ) from error


def shipped(folder: str) -> Path:
    """Return a folder that ships with the package: inside it, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / folder if (package / folder).is_dir() else package.parents[1] / folder


def checksum(content: str | bytes | Iterable[str | bytes | memoryview]) -> str:
    """Return SHA-256 of a text, of bytes, or of several of them one after the other."""
    digest = hashlib.sha256()
    for part in (content,) if isinstance(content, str | bytes) else content:
        digest.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Return what identifies a file's content for a cache: path, time of change, size.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return (str(path), status.st_mtime_ns, status.st_size)


def find_weights(folder: Path) -> Path:
    """Return the file of a model folder that holds its weights.

    Raises:
        UserError: There is none, or several of which no name is known.
    """
    # By known names first: a folder may also hold a training state or an older format.
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES)
    if len(found) == 1:
        return found[0]
    several = f" ({', '.join(file.name for file in found[:3])}, …)" if found else ""
    raise UserError(
        f"{folder} holds {'several weights' if found else 'no weights'}{several}, none named "
        f"{WEIGHTS[0]} or {WEIGHTS[2]}; name the file with --pretrained FILE (pretrained=)"
        f"{'' if found else ', or take --random-weights (random_weights=True): an untrained model'}"
    )


@cache
def hub_folder(repo: str) -> Path:
    """Return the folder of a Hugging Face repository: of the local cache, else fetched once.

    Args:
        repo: `org/name`.

    Raises:
        UserError: It is not in the cache and cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.model", *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES[:2])]
    try:
        # The cache alone first: a lookup at the hub would fail offline and take seconds online.
        try:
            found = Path(snapshot_download(repo, local_files_only=True))
            if any(file.suffix in WEIGHT_SUFFIXES for file in found.iterdir()):
                return found  # a tokenizer alone may have been fetched
        except LocalEntryNotFoundError:
            pass
        say(f"fetching {HUB}{repo}")  # offline that is tried for most of a minute
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except HFValidationError:
        raise UserError(
            f"hf-hub:{repo} is not a repository; write hf-hub:organisation/name"
        ) from None
    except Exception as error:  # noqa: BLE001 of the network, in any of its forms
        raise UserError(
            f"hf-hub:{repo} is not in the local cache and cannot be fetched "
            f"({one_line(first_cause(error))}); give the folder of a copy instead"
        ) from None


def file_checksum(file: Path) -> str:
    """Return SHA-256 of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def lock(file: Path, *, wait: bool = False) -> IO[bytes] | None:
    """Return a lock that holds until it is closed or this process ends, None where another has it.

    Args:
        file: The lock file, made where absent.
        wait: Whether to wait for the process that holds it; an interrupt ends the wait.
    """
    with ExitStack() as opened:
        # To append: opening to write would empty the file of a process that holds the lock.
        handle = opened.enter_context(file.open("ab"))
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
        # Closing the file would give the lock back; from here on it is the caller's.
        opened.pop_all()
        _LOCKS.add(handle)
        return handle


def _leave_locks() -> None:
    """Close the locks of the process that forked this one: they would outlive it in here."""
    for handle in _LOCKS:
        handle.close()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_locks)


def take_lock(file: Path, folder: Path, *, wait: bool = False) -> IO[bytes]:
    """Return the lock of a folder.

    Args:
        file: The lock file, made where absent.
        folder: The folder.
        wait: Whether to wait for the process that holds it, and to say so.

    Raises:
        UserError: Another process holds it, and it is not waited for; names the folder.
    """
    handle = lock(file)
    if handle is None and wait:
        say(f"waiting for the process that writes {folder}")
        handle = lock(file, wait=True)
    if handle is None:
        raise UserError(
            f"another process is writing {folder}; wait for it or choose another folder"
        )
    return handle
