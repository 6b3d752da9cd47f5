"""A drawing surface in normalised coordinates, with the blemishes that all drawings share.

Coordinates run from 0 to 1, x to the right and y down, whatever the resolution. Small images are
drawn at twice their size and reduced, which smooths edges. Blemishes (grain, uneven light) live
on a grid of their own, so they look alike at any resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]
GRAIN = 64
SMOOTH_BELOW = 160

COLOURS: dict[str, Colour] = {
    "red": (205, 45, 40),
    "orange": (235, 135, 35),
    "yellow": (240, 210, 55),
    "green": (50, 150, 65),
    "blue": (45, 90, 200),
    "purple": (130, 60, 165),
    "pink": (235, 130, 175),
    "brown": (125, 80, 45),
    "white": (240, 240, 238),
    "gray": (135, 135, 138),
    "black": (28, 28, 32),
}
VIVID = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")


def shade(rng: np.random.Generator, name: str, spread: float = 24.0) -> Colour:
    """Return a colour near the named one."""
    return jitter(rng, COLOURS[name], spread)


def jitter(rng: np.random.Generator, colour: Colour, spread: float = 24.0) -> Colour:
    """Return a colour at most `spread` levels away per channel."""
    off = rng.uniform(-spread, spread, 3)
    return (_level(colour[0] + off[0]), _level(colour[1] + off[1]), _level(colour[2] + off[2]))


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return `share` of `second` in `first`."""
    return tuple(_level(a + (b - a) * share) for a, b in zip(first, second))  # type: ignore[return-value]


def _level(value: float) -> int:
    return int(min(255.0, max(0.0, value)))


class Canvas:
    """A square picture under construction.

    Args:
        size: Side of the finished picture in pixels.
        paper: Background colour.
    """

    def __init__(self, size: int, paper: Colour) -> None:
        self.size = size
        self.side = size * 2 if size < SMOOTH_BELOW else size
        self.image = Image.new("RGB", (self.side, self.side), paper)
        self.pen = ImageDraw.Draw(self.image)
        self.place()

    def place(
        self,
        x: float = 0.5,
        y: float = 0.5,
        scale: float = 1.0,
        angle: float = 0.0,
        stretch: float = 1.0,
    ) -> Canvas:
        """Draw from here on in a frame whose origin is (x, y) and whose unit is `scale`.

        With the default arguments of the constructor the frame is shifted so that (0.5, 0.5) of
        the picture is (0, 0): use `whole` for plain picture coordinates.
        """
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        self._frame = (cos * stretch, -sin, x, sin * stretch, cos, y, scale)
        return self

    def whole(self) -> Canvas:
        """Draw from here on in picture coordinates."""
        self._frame = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0)
        return self

    def _map(self, points: Points) -> list[tuple[float, float]]:
        a, b, x0, c, d, y0, _ = self._frame
        side = self.side
        return [((a * x + b * y + x0) * side, (c * x + d * y + y0) * side) for x, y in points]

    def _width(self, width: float) -> int:
        return max(1, round(width * self._frame[6] * self.side))

    def polygon(self, points: Points, fill: Colour) -> None:
        """Fill a polygon."""
        self.pen.polygon(self._map(points), fill=fill)

    def line(self, points: Points, fill: Colour, width: float, closed: bool = False) -> None:
        """Draw a line of `width` frame units through the points."""
        mapped = self._map(points)
        # Beyond the start by one point, so that the last corner is joined as the others are.
        if closed:
            mapped += mapped[:2]
        self.pen.line(mapped, fill=fill, width=self._width(width), joint="curve")

    def disc(self, x: float, y: float, radius: float, fill: Colour, tall: float = 1.0) -> None:
        """Fill an ellipse of horizontal radius `radius`, `tall` times as high."""
        self.polygon([(x + radius * u, y + radius * tall * v) for u, v in unit_circle()], fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """Fill a rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def clutter(self, rng: np.random.Generator, colours: Sequence[Colour], count: int) -> None:
        """Scatter `count` short strokes and specks over the picture."""
        frame = self._frame
        self.whole()
        for x, y, dx, dy, kind, width in rng.uniform(0, 1, (count, 6)):
            # From the same draw as the kind: 997 mixes its digits, and no draw is added.
            colour = colours[int(kind * 997) % len(colours)]
            if kind < 0.6:
                end = (x + 0.3 * (dx - 0.5), y + 0.3 * (dy - 0.5))
                self.line([(x, y), end], colour, 0.01 + 0.015 * width)
            else:
                self.disc(x, y, 0.01 + 0.02 * width, colour)
        self._frame = frame

    def done(self, rng: np.random.Generator, grain: float = 0.10) -> Image.Image:
        """Return the finished picture, with grain and uneven light."""
        image = self.image
        if self.side != self.size:
            image = image.reduce(2)
        return blemish(rng, image, grain)


def blemish(rng: np.random.Generator, image: Image.Image, grain: float = 0.10) -> Image.Image:
    """Return the picture with grain, uneven light, and a shift of contrast and brightness.

    Args:
        rng: Where the amounts come from.
        image: A square picture.
        grain: Largest standard deviation of the grain, of 1.
    """
    amount, contrast, bright, slope_x, slope_y = rng.uniform(0, 1, 5)
    noise = rng.standard_normal((GRAIN, GRAIN), dtype=np.float32)
    noise *= np.float32(255 * grain * amount * amount)
    x, y = _ramps()
    noise += np.float32(60 * (slope_x - 0.5)) * x + np.float32(60 * (slope_y - 0.5)) * y
    size = image.size[0]
    if size != GRAIN:
        noise = np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.NEAREST))
    pixels = np.asarray(image, dtype=np.float32)
    gain = np.float32(0.7 + 0.45 * contrast)
    pixels = pixels * gain + (noise + np.float32(127 * (1 - gain) + 50 * (bright - 0.5)))[..., None]
    np.clip(pixels, 0, 255, out=pixels)
    return Image.fromarray(pixels.astype(np.uint8))


@cache
def _ramps() -> tuple[np.ndarray, np.ndarray]:
    ramp = np.linspace(-0.5, 0.5, GRAIN, dtype=np.float32)
    return ramp[None, :], ramp[:, None]


@cache
def unit_circle(count: int = 28) -> tuple[tuple[float, float], ...]:
    """Return `count` points on the circle of radius 1."""
    return tuple(
        (math.cos(2 * math.pi * k / count), math.sin(2 * math.pi * k / count)) for k in range(count)
    )


@cache
def coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of pixel centres in 0..1, (1, size) and (size, 1), float32."""
    centres = ((np.arange(size, dtype=np.float32) + 0.5) / size).astype(np.float32)
    return centres[None, :], centres[:, None]
