"""Decoding images: any common file becomes an upright RGB image, or says why it cannot."""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, features

from vlmlayers.errors import DataFault, NotJPEG, UnreadableImage, one_line

T = TypeVar("T")
LOG = logging.getLogger(__name__)

# Only formats whose decoders are in wide use: EPS, for one, would start another program.
_ALWAYS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # MPO opens as JPEG
# Pillow before 11.3 has never heard of it, and warns where it is asked.
_HAS_AVIF = "avif" in features.modules and features.check("avif")
FORMATS = (*_ALWAYS, "AVIF") if _HAS_AVIF else _ALWAYS
LARGEST = 89_478_485  # pixels; Pillow's own bound for a warning, about 0.25 GiB as RGB
# A long strip would explode when its short side is resized to a model's input.
LONGEST = 256  # times the short side
WHITES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # of cameras and scanners
DIMMEST = 16  # a picture in floating point whose brightest pixel is between 1 and this is none
OVERSHOOT = 0.1  # of the range, by which resizing leaves it in floating point
_RANGE = "scaled from"  # key of what is noted beside an image
_SCALED: dict[str, dict[tuple[float, float], str]] = {}  # ranges by dataset, and an image of each
_GAPS: set[str] = set()  # datasets of which an image has pixels that are no numbers
DARKEST = 64  # of 255: 14 bits of 16 stay below it
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


def open_image(
    source: str | os.PathLike[str] | bytes, name: str | None = None, at_least: int | None = None
) -> Image.Image:
    """Decode an image file, or bytes, as upright RGB.

    The content decides the format, not the suffix. EXIF orientation is applied; of an animation
    the first frame is taken; transparency is laid over white; CMYK is converted without a colour
    profile. Grey values of more than 8 bits are scaled: white is the largest value of the smallest
    of 8, 10, 12, 14 and 16 bits that holds the brightest pixel; floating-point values may also go
    from 0 or -1 to 1. In a TIFF that says so white is 0 and black the largest.

    Args:
        source: Path of a file, or its bytes.
        name: What to call the image in messages; the path by default.
        at_least: Pixels that both sides need: a JPEG is decoded at the smallest of 1/8, 1/4, 1/2
            and whole that has them, which skips work. Pixels differ from those of the whole image
            resized. Other formats ignore it.

    Raises:
        UserError: The file does not exist.
        UnreadableImage: It is not an image, truncated, empty, too large or too long, or its values
            fit no usual range.
    """
    return _opened(source, name, lambda handle, name: _decode(handle, name, at_least))


def read_jpeg(source: str | os.PathLike[str] | bytes, name: str | None = None) -> tuple[bytes, int]:
    """Return a JPEG as it is, for a decoder on a GPU, and its EXIF orientation (1 to 8).

    Args:
        source: Path of a file, or its bytes.
        name: What to call the image in messages; the path by default.

    Raises:
        UserError: The file does not exist.
        NotJPEG: It is of another format, or neither grey nor RGB.
        UnreadableImage: It is empty, too large or too long, or its header is broken.
    """
    return _opened(source, name, _jpeg)


def _opened(
    source: str | os.PathLike[str] | bytes, name: str | None, use: Callable[[BinaryIO, str], T]
) -> T:
    """Return what `use` makes of an open image file that is not empty, and its name."""
    if isinstance(source, bytes):
        return _used(io.BytesIO(source), name or "image", len(source), use)
    path = Path(source)
    name = name or str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(f"{name} is not a regular file")
        with path.open("rb") as handle:
            return _used(handle, name, status.st_size, use)
    except FileNotFoundError:
        raise DataFault(f"the image {name} is missing; `vlmlayers data check` says more") from None
    except OSError as error:
        raise UnreadableImage(f"{name} cannot be read: {error.strerror or error}") from None


def upright(image: Image.Image, name: str) -> Image.Image:
    """Return an image that is open already as `open_image` gives it; the one given stays.

    Raises:
        UnreadableImage: It is too large or too long, or its values fit no usual range.
    """
    _expect_size(image, name)
    negative = is_negative(image)  # which a copy does not say
    turned = image.copy()
    _turn_upright(turned)
    return _to_rgb(turned, name, negative)


def _used(handle: BinaryIO, name: str, size: int, use: Callable[[BinaryIO, str], T]) -> T:
    if size == 0:
        raise UnreadableImage(f"{name} is empty (0 bytes)")
    with faults_named(name):
        return use(handle, name)


def _decode(handle: BinaryIO, name: str, at_least: int | None) -> Image.Image:
    with Image.open(handle, formats=FORMATS) as image:
        _expect_size(image, name)
        wide = _is_wide(image)  # before it loads: the tiles that say so are then gone
        negative = is_negative(image)
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        if wide:
            _expect_high_bits(image, name)
        _turn_upright(image)
        return _to_rgb(image, name, negative)


def _jpeg(handle: BinaryIO, name: str) -> tuple[bytes, int]:
    with Image.open(handle, formats=FORMATS) as image:  # its header alone
        _expect_size(image, name)
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
            raise NotJPEG(
                f"decoding nvjpeg takes JPEG files in RGB or grey, and {name} is {image.format} "
                f"in {image.mode}; take decoding full or reduced"
            )
        try:
            turned = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        except _FAULTS:  # broken EXIF says nothing of the pixels, which are sound
            turned = 1
    handle.seek(0)
    return handle.read(), turned if 1 <= turned <= 8 else 1


@contextmanager
def faults_named(name: str) -> Iterator[None]:
    """Turn what Pillow raises of a file into one line."""
    try:
        yield
    except (UnreadableImage, NotJPEG):
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage(f"{name} is not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(f"{name} has more than {LARGEST:,} pixels; refused") from None
    except _FAULTS as error:
        raise UnreadableImage(f"{name} cannot be decoded: {one_line(error)}") from None


def _expect_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if not width * height:
        raise UnreadableImage(f"{name} has {width} x {height} pixels; it is empty")
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


def _is_wide(image: ImageFile.ImageFile) -> bool:
    """Return whether Pillow will cut colours of 16 bits down to their upper 8."""
    modes = [tile[3] for tile in image.tile]
    raw = [mode if isinstance(mode, str) else str((mode or ())[:1]) for mode in modes]
    return not image.mode.startswith("I") and any(";16" in mode for mode in raw)


def is_negative(image: Image.Image) -> bool:
    """Return whether white is 0 in a TIFF of more than 8 bits, which Pillow leaves as it is."""
    deep = image.mode.startswith(("I", "F"))
    return deep and getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0


def _expect_high_bits(image: Image.Image, name: str) -> None:
    bands = [image.getchannel(band) for band in image.getbands() if band != "A"]
    if max(int(np.asarray(band).max(initial=0)) for band in bands) < DARKEST:
        raise UnreadableImage(
            f"{name} has colours of 16 bits of which the upper ones are not used; convert it to 8"
        )


def _to_rgb(image: Image.Image, name: str, negative: bool) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:  # a PNG may name a clear colour
        # A copy outlives the file, which is closed when the context around this ends.
        return image.copy()
    # Pillow's own conversion clips these at 255, which turns most of a 16-bit image white.
    if image.mode.startswith(("I", "F")):
        grey = eight_bit(np.asarray(image), name)
        return (ImageOps.invert(grey) if negative else grey).convert("RGB")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        ground = Image.new("RGB", layer.size, (255, 255, 255))
        ground.paste(layer, mask=layer.getchannel("A"))
        return ground
    return image.convert("RGB")


def eight_bit(image: NDArray[np.generic], name: str) -> Image.Image:
    """Return pixels of more than 8 bits scaled to 0..255; some that are no numbers become black.

    Raises:
        UnreadableImage: Its values fit no usual range, or none is a number.
    """
    values = image.astype(np.float32)
    known = values[np.isfinite(values)]
    if values.size and not known.size:
        raise UnreadableImage(f"{name} has no pixel that is a number")
    low, high = float(known.min(initial=0)), float(known.max(initial=0))
    found = _range(low, high, floating=image.dtype.kind == "f")
    if found is None:
        raise UnreadableImage(
            f"{name} has values from {low:g} to {high:g}, no usual range; convert it to 8 bits"
        )
    black, white = found
    np.nan_to_num(values, copy=False, nan=black, posinf=white, neginf=black)
    values = (values - black) * (255 / (white - black))
    np.clip(np.rint(values, out=values), 0, 255, out=values)
    made = Image.fromarray(values.astype(np.uint8))
    if low or high:  # black is black in any range
        made.info[_RANGE] = (black, white, known.size < values.size)
    return made


def note_range(dataset: str, image: Any, path: str) -> None:
    """Warn, once a dataset and process, of images that were scaled unlike others of their dataset.

    An image tells of its range by its own pixels alone: a dark one may be taken for one of fewer
    bits, and is then made brighter than the others.

    Args:
        dataset: Name of the dataset.
        image: What `open_image`, `upright` or `eight_bit` returned; tensors are as they are.
        path: Path of the image.
    """
    if (found := getattr(image, "info", {}).get(_RANGE)) is None:
        return
    black, white, gaps = found
    seen = _SCALED.setdefault(dataset, {})
    if (black, white) not in seen:
        seen[black, white] = path
        if len(seen) == 2:
            ranges = " and ".join(f"{low:g} to {high:g} ({of})" for (low, high), of in seen.items())
            LOG.warning(
                "%s: each image is scaled by its own brightest pixel, some from %s; where all "
                "have one range, convert them to 8 bits by it",
                dataset,
                ranges,
            )
    if gaps and dataset not in _GAPS:
        _GAPS.add(dataset)
        LOG.warning("%s: pixels of %s are no numbers: NaN is black, Inf white", dataset, path)


def forget_ranges(dataset: str) -> None:
    """Forget what `note_range` saw of a dataset: another one of its name begins."""
    _SCALED.pop(dataset, None)
    _GAPS.discard(dataset)


def _range(low: float, high: float, *, floating: bool) -> tuple[float, float] | None:
    """Return what is black and what is white, None where values fit no usual range."""
    if not floating:
        return next(((0.0, white) for white in WHITES if low >= 0 and high <= white), None)
    if high <= 1 + OVERSHOOT and -1 - OVERSHOOT <= low < -OVERSHOOT:
        return -1.0, 1.0
    white = next((white for white in (1, *WHITES) if high <= white * (1 + OVERSHOOT)), None)
    if white is None or low < -white * OVERSHOOT or (white > 1 and high < DIMMEST):
        return None
    return 0.0, float(white)
