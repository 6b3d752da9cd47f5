"""Decoding: every odd image becomes upright RGB, or is refused with its name."""

from __future__ import annotations

import io
import os
import re
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from vlmlayers.data.readers import (
    LARGEST,
    LONGEST,
    eight_bit,
    note_range,
    open_image,
    read_jpeg,
    upright,
)
from vlmlayers.errors import UnreadableImage, UserError
from vlmlayers.manifests import Manifest

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]
FORMATS += ["AVIF"] if features.check("avif") else []


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_content_decides_the_format_and_not_the_suffix(tmp_path: Path, format: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(picture(), format))
    image = open_image(path)
    assert (image.mode, image.size, type(image)) == ("RGB", (12, 8), Image.Image)
    difference = np.asarray(image).astype(int) - np.asarray(picture())
    assert np.abs(difference).mean() < 30
    image.load()  # the file is closed; the pixels are here


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The eight orientations are the symmetries of a rectangle; NumPy turns the pixels itself."""
    pixels = np.asarray(picture(size=(3, 2)))
    stored = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, 1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2), 8: np.rot90(pixels, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(content)), pixels)


@pytest.mark.parametrize(("written", "told"), [(1, 1), (6, 6), (8, 8), (0, 1), (9, 1)])
def test_a_jpeg_is_handed_on_with_an_orientation_that_there_is(written: int, told: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = written
    content = encoded(picture(), "JPEG", exif=exif)
    assert read_jpeg(content) == (content, told)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_image() -> None:
    content = encoded(picture(), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + b"\x00" * 9)
    assert open_image(content).size == (12, 8)


@pytest.mark.parametrize(
    ("least", "size"),
    [
        (100, (200, 150)),
        (150, (200, 150)),
        (151, (400, 300)),
        (75, (100, 75)),
        (1, (100, 75)),
        (900, (800, 600)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_has_the_pixels(least, size) -> None:
    ramp = np.linspace(0, 255, 800 * 600, dtype=np.uint8).reshape(600, 800)
    image = Image.fromarray(ramp).convert("RGB")
    assert open_image(encoded(image, "JPEG"), at_least=least).size == size
    assert open_image(encoded(image, "PNG"), at_least=least).size == (800, 600)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        image = open_image(encoded(Image.fromarray(values), format))
        assert np.asarray(image)[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]
    whole = open_image(encoded(Image.fromarray(values.astype(np.int32)), "TIFF"))
    assert np.asarray(whole)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_a_tiff_in_which_white_is_zero(kind: type) -> None:
    """As of X-rays; Pillow turns those of 8 bits round, and no others."""
    white = 255 if kind is np.uint8 else 65535
    shares = np.array([[0, 0.25, 0.5, 1]])
    content = encoded(Image.fromarray(np.rint(shares * white).astype(kind)), "TIFF")
    black, negative = (struct.pack("<HHIH", 262, 3, 1, value) for value in (1, 0))
    assert content.count(black) == 1
    content = content.replace(black, negative)
    with Image.open(io.BytesIO(content)) as image:
        for found in (open_image(content), upright(image, "image")):
            np.testing.assert_allclose(np.asarray(found)[0, :, 0], 255 * (1 - shares[0]), atol=0.6)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_wide_values_that_use_a_part_of_their_range_are_not_black(bits: int, format: str) -> None:
    """As cameras, scanners and NumPy write them; white is white whatever the file could hold."""
    white = 2**bits - 1
    shares = np.array([[0, 0.25, 0.5, 1]])
    values = np.rint(shares * white)
    images = [Image.fromarray(values.astype(np.uint16))]
    if format == "TIFF":
        images += [Image.fromarray(values.astype(kind)) for kind in (np.int32, np.float32)]
    for image in images:
        pixels = np.asarray(open_image(encoded(image, format)))[0, :, 0]
        np.testing.assert_allclose(pixels, shares[0] * 255, atol=0.5)


def test_images_that_are_scaled_unlike_others_of_their_dataset_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, kinds in {"dim": (900, 4000, 4200), "even": (0, 3000, 4090)}.items():
        (tmp_path / name / "a").mkdir(parents=True)
        for number, white in enumerate(kinds):
            values = np.linspace(0, white, 64).reshape(8, 8).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / name / "a" / f"{number}.png")
        manifest = Manifest.load(str(tmp_path / name))
        for split in manifest.splits():
            for item in manifest.items(split):
                manifest.open_image(item)
    (line,) = caplog.messages
    assert line.startswith("dim: each image is scaled by its own brightest pixel, some from 0 to ")
    assert "convert them to 8 bits" in line


def test_pixels_that_are_no_numbers_are_told_and_nothing_else_is_no_image(
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0], values[0, 1] = np.nan, np.inf
    image = eight_bit(values, "x")
    assert np.asarray(image)[0, :2].tolist() == [0, 255]
    note_range("gappy", image, "x.tif")
    note_range("gappy", image, "y.tif")
    assert caplog.messages == ["gappy: pixels of x.tif are no numbers: NaN is black, Inf white"]
    with pytest.raises(UnreadableImage, match="x has no pixel that is a number"):
        eight_bit(np.full((4, 4), np.nan), "x")


@pytest.mark.parametrize(
    ("values", "pixels"),
    [
        ([0.0, 0.5, 1.0, np.nan], [0, 128, 255, 0]),  # shares
        ([0, 7, 254.6, np.inf], [0, 7, 255, 255]),  # bytes
        ([-1, 0, 1, np.nan], [0, 128, 255, 0]),  # around zero
        ([-0.02, 0.5, 1.03], [0, 128, 255]),  # shares, a little out of range by resizing
    ],
)
def test_floats_are_shares_or_bytes_and_never_nan(values: list[float], pixels: list[int]) -> None:
    image = open_image(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))
    assert np.asarray(image)[0].tolist() == [[pixel] * 3 for pixel in pixels]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 100_000]], np.int32),
        np.array([[-400, 900]], np.int32),
        np.array([[0, 5]], np.float32),
        np.array([[-40, 60]], np.float32),
        np.array([[-40, 1]], np.float32),
        np.array([[0, 1e9]], np.float32),
    ],
)
def test_values_of_no_usual_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(UnreadableImage, match="no usual range; convert it to 8 bits"):
        open_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_sixteen_bits(channels: int) -> None:
    """Pillow keeps the upper eight; where nothing is in them the image would be black."""
    eight = np.random.default_rng(0).integers(0, 256, (8, 8, channels))
    if channels != 3:
        eight[..., -1] = 255  # opaque
    pixels = np.asarray(open_image(wide_png(eight * 257)))
    np.testing.assert_array_equal(pixels[..., 0], eight[..., 0])
    for bits in (8, 12, 14):
        content = eight * 2 ** (bits - 8)
        content[..., -1] = 65535 if channels != 3 else content[..., -1]
        with pytest.raises(UnreadableImage, match="of which the upper ones are not used; convert"):
            open_image(wide_png(content))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_lies_over_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
    image.putpixel((1, 0), (10, 10, 10, 0))
    if mode == "P":
        palette = Image.new("P", (2, 1))
        palette.putpalette([10, 10, 10, 90, 0, 0])
        palette.putpixel((1, 0), 1)
        content = encoded(palette, "PNG", transparency=1)
    elif mode == "RGB":
        image.putpixel((1, 0), (90, 0, 0, 255))
        content = encoded(image.convert("RGB"), "PNG", transparency=(90, 0, 0))
    else:
        content = encoded(image.convert(mode), "PNG")
    pixels = np.asarray(open_image(content))
    assert pixels[0].tolist() == [[10, 10, 10], [255, 255, 255]]


def test_other_modes() -> None:
    cmyk = open_image(encoded(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF"))
    assert cmyk.getpixel((0, 0)) == (0, 255, 255)
    assert open_image(encoded(picture().convert("1"), "PNG")).mode == "RGB"
    assert open_image(encoded(picture().convert("P"), "GIF")).mode == "RGB"
    grey = open_image(encoded(picture().convert("L"), "PNG"))
    np.testing.assert_array_equal(np.asarray(grey)[..., 2], np.asarray(picture().convert("L")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#0000ff", "#00ff00")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert open_image(content).getpixel((4, 4)) == (255, 0, 0)


# What is refused


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a part of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def wide_png(values: np.ndarray) -> bytes:
    """Return a PNG of 16 bits for each of 2, 3 or 4 channels, which Pillow does not write."""
    height, width, channels = values.shape
    colours = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims any size and holds almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def webp_header(width: int, height: int) -> bytes:
    """Return a WebP canvas of any size with next to nothing on it."""
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    lossless = ((width - 1) | (height - 1) << 14 | 1 << 28).to_bytes(4, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([16, 0, 0, 0]) + sizes
    body += b"VP8L" + struct.pack("<I", 10) + b"\x2f" + lossless + b"\0" * 5
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"plain text, no image", "is not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image of a known format"),
        (encoded(picture(), "JPEG")[:300], "cannot be decoded"),
        (encoded(picture(3, (200, 200)), "JPEG")[:-900], "cannot be decoded: image file is trunc"),
        (encoded(picture(3, (200, 200)))[:-900], "cannot be decoded"),
        (encoded(picture(), "WEBP")[:-20], "cannot be decoded"),
        (png_header(10, 10_000_000), "pixels; more than 89,478,485 are refused"),
        (png_header(20_000, 20_000), "pixels; refused"),
        (png_header(60_000, 60_000), "pixels; refused"),
        (webp_header(16_000, 16_000), "pixels; refused"),
        (encoded(Image.new("L", (1, LONGEST + 1))), "sides beyond 1:256 are refused"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_images_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage) as caught:
        open_image(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_largest_size_that_is_read() -> None:
    assert 9459 * 9459 < LARGEST < 9460 * 9460
    wide = Image.new("L", (LONGEST * 2, 2), 7)
    assert open_image(encoded(wide)).size == wide.size


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jpg is missing") as caught:
        open_image(tmp_path / "absent.jpg")
    assert not isinstance(caught.value, UnreadableImage)
    with pytest.raises(UnreadableImage, match="is not a regular file"):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="is not a regular file"):  # and does not wait
        open_image(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="^shard.tar/a.jpg is not an image"):
        open_image(b"text", "shard.tar/a.jpg")


def test_permissions(tmp_path: Path) -> None:
    path = tmp_path / "closed.png"
    path.write_bytes(encoded(picture()))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("needs a user who is refused files, not root")
    with pytest.raises(UnreadableImage, match="cannot be read: Permission denied"):
        open_image(path)


SAMPLES = [encoded(picture(3, (40, 30)), format) for format in FORMATS]


def refusal(content: bytes) -> str:
    """Return why content is refused, empty where an RGB image comes out; nothing else is raised."""
    try:
        image = open_image(content, "fuzz")
    except UnreadableImage as error:
        return str(error)
    assert image.mode == "RGB"
    return ""


ANSWER = re.compile(r"(fuzz [^\n\r]+)?")


@pytest.mark.parametrize("content", SAMPLES, ids=FORMATS)
def test_images_are_read_before_they_are_damaged(content: bytes) -> None:
    assert refusal(content) == ""


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 6))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(content)))
    return bytes(content[:cut] if draw(st.booleans()) else content)


@settings(max_examples=150, deadline=None)
@given(damaged())
@pytest.mark.filterwarnings("ignore")
def test_damaged_images(content: bytes) -> None:
    assert ANSWER.fullmatch(refusal(content))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_images() -> None:
    random = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60_000):
        content = bytearray(SAMPLES[random.integers(len(SAMPLES))])
        head = int(random.choice([32, 200, len(content)]))
        for place in random.integers(0, min(head, len(content)), random.integers(1, 5)):
            content[place] = random.integers(256)
        assert ANSWER.fullmatch(refusal(bytes(content)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB: 1 GB
