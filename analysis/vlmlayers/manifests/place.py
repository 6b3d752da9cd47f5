"""Where a dataset lies: data root, folder, and the files of its items."""

from __future__ import annotations

import codecs
import os
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from vlmlayers.errors import DataFault, UserError
from vlmlayers.files import file_checksum, file_stamp
from vlmlayers.manifests.items import checked_path, is_there
from vlmlayers.manifests.schema import Spec

Root = str | os.PathLike[str] | None  # the data root; None looks for it, as `data_root` says
DATA_VARIABLE = "VLMLAYERS_DATA"
LARGEST_LIST = 300_000_000  # bytes; CoOp's layout for all of ImageNet takes about 130 MB


class MissingData(DataFault):
    """Files of a dataset are not on this machine."""


class AlteredData(UserError):
    """A file differs from the one that the manifest was written for."""


def data_root(root: Root = None) -> Path:
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
            # Beside the TOML file first: who brings a manifest brings its lists along.
            for base in (self.beside, self.root) if self.beside else (self.root,):
                if (base / candidate).is_file():
                    return base / candidate
        shown = " or ".join(str(self.root / candidate) for candidate in candidates)
        raise MissingData(f"{self.name}: {what} not found at {shown}; {self.hint}")

    def inside(self, path: str) -> Path:
        """Return where an item's file lies, links followed, since they were made with the folder.

        Accented letters may be written in one piece or in two (Unicode NFC or NFD) in a list and
        the other way on the disk.

        Raises:
            UserError: The path leaves the dataset's folder by its words.
        """
        located = self.images / checked_path(path, f"{self.name}: the list of items")
        if path.isascii() or is_there(located):
            return located
        found = self.images
        for part in PurePosixPath(path).parts:
            forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
            written = (found / form for form in forms)
            found = next((file for file in written if is_there(file)), found / part)
        return found


def known_checksum(path: Path) -> str:
    """Return SHA-256 of a file's bytes; a file that did not change since is not read again."""
    return _checksum(file_stamp(path))


@lru_cache(maxsize=64)
def _checksum(stamp: tuple[str, int, int]) -> str:
    # Time and size are in the key, so that a file that changed is read again.
    return file_checksum(Path(stamp[0]))


def read_text(path: Path) -> str:
    """Read a text file of UTF-8, or of UTF-16 that says so, as spreadsheets write it.

    Raises:
        UserError: It cannot be read, is of another encoding, or is larger than `LARGEST_LIST`.
    """
    try:
        if path.stat().st_size > LARGEST_LIST:
            raise UserError(
                f"{path} is larger than {LARGEST_LIST:,} bytes; it is not a list of items"
            )
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        # `utf-8-sig` drops the mark that spreadsheets write before the name of the first column.
        text = content.decode("utf-16" if wide else "utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
