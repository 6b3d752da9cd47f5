"""Names of files: which are images, and which were left behind by systems and programs."""

from __future__ import annotations

IMAGE_SUFFIXES = frozenset(
    ["avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"]
)
UNREAD_SUFFIXES = frozenset(
    ["arw", "cr2", "dng", "exr", "hdr", "heic", "heif", "jp2", "jxl", "nef", "npy", "psd", "svg"]
)  # of images in formats that are not read
FOREIGN = frozenset(
    ["$RECYCLE.BIN", "@eaDir", "__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini", "lost+found"]
)


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in small letters, without a dot."""
    return name.rpartition(".")[2].lower()


def is_foreign(name: str) -> bool:
    """Return whether a file or folder is no part of the data: hidden, or left by a system."""
    return name in FOREIGN or (name.startswith(".") and bool(name.strip(".")))
