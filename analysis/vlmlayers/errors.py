"""Errors that a person can act on: one line that names what, where, and what to do."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

# After Ctrl-C, of any verb: some keep what they finish, others write all at the end.
RESUME = "Stopped. Start the same command again: it goes on from what it saved, or starts over."
LONGEST = 1500  # characters of a message: a file may hold a name of any length
DISK = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
}


class UserError(Exception):
    """The user's input is wrong. The command line prints the message and exits with code 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(" ".join(str(message).splitlines()), LONGEST))

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: the caller's own lines and the message, not ten of ours."""
        import traceback  # late, as commands start without it

        of_caller = []
        for frame, line in traceback.walk_tb(self.__traceback__):
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
            if package in ("vlmlayers", "vlmadapters"):
                break
            if package not in ("IPython", "contextlib"):  # of decorators around ours
                of_caller.append((frame, line))
        lines = traceback.StackSummary.extract(iter(of_caller)).format()
        return [*(line.rstrip() for line in lines), f"{type(self).__name__}: {self}"]


class Terminated(KeyboardInterrupt):
    """SIGTERM, as of a scheduler that needs the machine: work ends as on Ctrl-C, which it is."""


def stop_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a command that was stopped, as a shell names the signal."""
    return 143 if isinstance(stop, Terminated) else 130


class OtherExtraction(UserError):
    """A folder holds features of other items or options; only its owner may delete it."""


def printable(text: str) -> str:
    """Return text in one line, with control characters and marks of direction spelled out.

    What a file holds must not steer the terminal that its name is shown on.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def looked_for(path: str | os.PathLike[str]) -> str:
    """Return, for a message about a missing path, where a relative one was looked for."""
    found = Path(path).expanduser()
    return "" if found.is_absolute() else f" (looked for {found.absolute()})"


def no_file(path: str | os.PathLike[str]) -> str:
    """Return, for a message about a path that is no file, whether it is a folder or not there."""
    if Path(path).expanduser().is_dir():
        return "is a folder; name a file in it"
    return f"does not exist{looked_for(path)}"


def first_cause(error: BaseException) -> BaseException:
    """Return the error that the others were raised from."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, shortened; its class where it has none."""
    return shortened(" ".join(str(error).split()), 200) or type(error).__name__


def shortened(text: str, most: int = 80) -> str:
    """Return text of so many characters at most; a cut ends in an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def disk_trouble(error: OSError) -> str:
    """Return one line for an error of `DISK`: what cannot be read or written, why, what to do.

    The system does not say which of the two was tried; where permission was refused, the file or
    folder is looked at again.
    """
    verb, advice = "write", DISK[error.errno or 0]
    if isinstance(error, PermissionError) and error.filename is not None:
        verb, advice = _refused(os.fsdecode(error.filename)) or (verb, advice)
    where = "" if error.filename is None else f" {os.fsdecode(error.filename)}"
    return f"cannot {verb}{where}: {error.strerror}; {advice} and start the same command again"


def _refused(name: str) -> tuple[str, str] | None:
    """Return what permission lacks to read a path, or None where it can be read or is not there."""
    path = Path(name)
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except PermissionError:
        return "reach", "allow yourself to enter its folder"
    except OSError:
        return None
    try:
        if folder:
            os.scandir(name).close()
        else:
            path.open("rb").close()
    except OSError:
        return "read", "allow yourself to read it"
    return None


class WriteFault(UserError):
    """A file or folder cannot be written, nor can others beside it."""


class DataFault(UserError):
    """Files of one dataset are missing or cannot be read; other datasets can go on."""


class UnreadableImage(DataFault):
    """An image file exists but cannot be decoded."""


class NotJPEG(UserError):
    """An image is no JPEG file that a GPU can decode, where all have to be."""


def nearest(value: str, valid: Iterable[str]) -> str | None:
    """Return the valid name closest to `value`, or None where nothing is close."""
    names = list(valid)
    # Without case: "vit-b-16" is meant for "ViT-B-16", which shares few letters with it otherwise.
    folded = {name.casefold(): name for name in names}
    match = get_close_matches(str(value).casefold(), folded, n=1, cutoff=0.5)
    return folded[match[0]] if match else None


def check_one_of(kind: str, value: str, valid: Iterable[str], where: str = "") -> str:
    """Return `value` if it is among `valid`.

    Args:
        kind: What the value is, for the message: "metric", "dataset", "position", …
        value: The name to check.
        valid: The names that would be right.
        where: Where the value came from, such as a file name; appended to the message.

    Raises:
        UserError: The value is not among them. Names the nearest valid one, or up to twelve.
    """
    names = list(valid)
    if value in names:
        return value
    place = f" in {where}" if where else ""
    # A number is not misspelt: 10 is no nearer to layer 0 than 1 is.
    close = None if str(value).lstrip("-").isdecimal() else nearest(value, names)
    if close is not None:
        hint = f"did you mean {close!r}?"
    else:
        shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
        hint = f"valid: {shown}"
    raise UserError(f"unknown {kind} {value!r}{place}; {hint}")
