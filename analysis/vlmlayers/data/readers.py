"""Decoding images: any common file becomes an upright RGB image, or says why it cannot."""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vlmlayers.errors import UnreadableImage, UserError

# Only formats whose decoders are in wide use: EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # MPO opens as JPEG
LARGEST = 89_478_485  # pixels; Pillow's own bound for a warning, about 0.25 GiB as RGB
# A long strip would explode when its short side is resized to a model's input.
LONGEST = 256  # times the short side
_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def open_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Decode an image file, or bytes, as upright RGB.

    The content decides the format, not the suffix. EXIF orientation is applied; of an animation
    the first frame is taken; transparency is laid over white; 16-bit values are scaled to 8 bit
    rather than clipped; CMYK is converted without a colour profile.

    Args:
        source: Path of a file, or its bytes.
        name: What to call the image in messages; the path by default.

    Raises:
        UserError: The file does not exist.
        UnreadableImage: It is no image, truncated, empty, too large or too long.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), name or "image", len(source))
    path = Path(source)
    name = name or str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(f"{name} is not a regular file")
        with path.open("rb") as handle:
            return _decode(handle, name, status.st_size)
    except FileNotFoundError:
        raise UserError(f"the image {name} is missing; `vlmlayers data check` says more") from None
    except OSError as error:
        raise UnreadableImage(f"{name} cannot be read: {error.strerror or error}") from None


def _decode(handle: BinaryIO, name: str, size: int) -> Image.Image:
    if size == 0:
        raise UnreadableImage(f"{name} is empty (0 bytes)")
    try:
        with Image.open(handle, formats=FORMATS) as image:
            _expect_size(image, name)
            image.load()
            _turn_upright(image)
            return _to_rgb(image)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage(f"{name} is not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(f"{name} has more than {LARGEST:,} pixels; refused") from None
    except _FAULTS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableImage(f"{name} cannot be decoded: {reason}") from None


def _expect_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > LARGEST:
        raise UnreadableImage(
            f"{name} has {width} x {height} pixels; more than {LARGEST:,} are refused"
        )
    if max(width, height) > LONGEST * min(width, height):
        raise UnreadableImage(
            f"{name} has {width} x {height} pixels; sides beyond 1:{LONGEST} are refused"
        )


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except _FAULTS:  # broken EXIF says nothing of the pixels, which are sound
        return


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bit(image)).convert("RGB")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        ground = Image.new("RGB", layer.size, (255, 255, 255))
        ground.paste(layer, mask=layer.getchannel("A"))
        return ground
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> NDArray[np.uint8]:
    """Scale a grey image of 16 or 32 bit to 0..255; floats are taken as 0..1 or 0..255."""
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        np.nan_to_num(values, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        values *= 255 if values.max(initial=0.0) <= 1 else 1
    else:
        values /= 257  # 65535 is white
    return np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8)
