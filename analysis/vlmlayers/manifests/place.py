"""Where a dataset lies: data root, folder, and the refusal of links that lead out of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vlmlayers.errors import UserError
from vlmlayers.files import file_checksum
from vlmlayers.manifests.items import checked_path
from vlmlayers.manifests.schema import Spec

DATA_VARIABLE = "VLMLAYERS_DATA"
LARGEST_LIST = 300_000_000  # bytes; CoOp's layout for all of ImageNet takes about 130 MB


class MissingData(UserError):
    """Files of a dataset are not on this machine."""


class AlteredData(UserError):
    """A file differs from the one that the manifest was written for."""


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the data root: the argument, else `VLMLAYERS_DATA`, else `data` in this folder."""
    chosen = root or os.environ.get(DATA_VARIABLE) or "data"
    return Path(chosen).expanduser()


@dataclass(frozen=True)
class Place:
    """A dataset's folders on this machine.

    Attributes:
        name: Name of the dataset, for messages.
        spec: Its manifest's content.
        root: The data root.
        beside: Folder of the TOML file, where `folder` starts with `.`.
    """

    name: str
    spec: Spec
    root: Path
    beside: Path | None = None

    @property
    def folder(self) -> Path:
        """The dataset's folder."""
        if self.spec.folder.startswith(".") and self.beside is not None:
            return self.beside / self.spec.folder
        return self.root / self.spec.folder

    @property
    def images(self) -> Path:
        """The folder to which the items' paths are relative."""
        return self.folder / self.spec.images if self.spec.images else self.folder

    @property
    def hint(self) -> str:
        """Where to get what is missing."""
        where = f"get it: {'; '.join(self.spec.get)}" if self.spec.get else "put it there"
        return f"{where}, or name another data root ({DATA_VARIABLE} or --data-root)"

    def find(self, candidates: tuple[str, ...], what: str) -> Path:
        """Return the first candidate that exists under the data root or beside the TOML file.

        Raises:
            MissingData: None of them exists.
        """
        for candidate in candidates:
            for base in (self.beside, self.root) if self.beside else (self.root,):
                if (base / candidate).is_file():
                    return base / candidate
        shown = " or ".join(str(self.root / candidate) for candidate in candidates)
        raise MissingData(f"{self.name}: {what} not found at {shown}; {self.hint}")

    def inside(self, path: str) -> Path:
        """Return where an item's file lies.

        Raises:
            UserError: The path leaves the dataset's folder, by its words or through a link.
        """
        checked_path(path, f"{self.name}: the list of items")
        located = self.images / path
        real = Path(os.path.realpath(located))
        if not any(real.is_relative_to(base) for base in self._real_bases()):
            raise UserError(
                f"{self.name}: {path!r} is a link that leaves the dataset's folder; refused"
            )
        return located

    def _real_bases(self) -> tuple[Path, ...]:
        # A split's folder may itself be a link: that is how large sets are put in place.
        folders = (".", *self.spec.split_folders.values())
        return _resolved(str(self.images), folders)


@lru_cache(maxsize=256)
def _resolved(images: str, folders: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(Path(os.path.realpath(Path(images) / folder)) for folder in folders)


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


def known_checksum(path: Path) -> str:
    """Return SHA-256 of a file's bytes; a file that did not change since is not read again."""
    return _checksum(file_stamp(path))


@lru_cache(maxsize=64)
def _checksum(stamp: tuple[str, int, int]) -> str:
    return file_checksum(Path(stamp[0]))


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        UserError: It cannot be read, is not UTF-8, or is larger than `LARGEST_LIST`.
    """
    try:
        if path.stat().st_size > LARGEST_LIST:
            raise UserError(f"{path} is larger than {LARGEST_LIST:,} bytes; no list of items")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
