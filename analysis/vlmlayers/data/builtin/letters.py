"""Letters of the alphabet, capital and small, in Pillow's own typeface."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard, pick
from vlmlayers.data.builtin.canvas import VIVID, Canvas, mix, shade

LETTERS = tuple("abdefghmnqrt")
CASES = ("capital", "small")
PAIRS = checkerboard(LETTERS, CASES)
GRAMMAR = (
    "the {name} in {colour}",
    "a {weight} {name}",
    "a {colour} {name} on {paper}",
    "a {weight} {colour} {name}",
    "the {name} printed on {paper}",
)


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's typeface at a size in pixels."""
    return ImageFont.load_default(size)  # type: ignore[return-value]


@lru_cache(maxsize=512)
def glyph(letter: str, side: int, stroke: int) -> Image.Image:
    """Return one letter as a mask of `side` pixels, baseline and height kept."""
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).text(
        (side / 2, 0.72 * side),
        letter,
        fill=255,
        font=font(round(0.72 * side)),
        anchor="ms",
        stroke_width=round(stroke * side / 128),
    )
    return mask


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Choose weight, tilt, slant, place and colours."""
    letter, case = PAIRS[label]
    colour, paper = rng.choice((*VIVID, "white", "black", "gray"), 2, replace=False)
    stroke = int(rng.integers(0, 4))
    return {
        "letter": letter.upper() if case == "capital" else letter,
        "colour": str(colour),
        "paper": str(paper),
        "stroke": stroke,
        "weight": "bold" if stroke > 1 else "thin",
        "zoom": float(rng.uniform(0.75, 1.45)),
        "angle": float(rng.normal(0, 0.2)),
        "slant": float(rng.normal(0, 0.15)),
        "shift": rng.uniform(-0.13, 0.13, 2),
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one letter among faint other ones."""
    paper, ink = shade(rng, plan["paper"]), shade(rng, plan["colour"])
    canvas = Canvas(size, paper)
    canvas.clutter(rng, (mix(paper, ink, 0.35), mix(paper, ink, 0.6)), int(rng.integers(3, 10)))
    faint = mix(paper, ink, float(rng.uniform(0.15, 0.4)))
    for _ in range(int(rng.integers(0, 4))):
        ghost = glyph(pick(rng, "cijklopsuvwxyz"), max(8, canvas.side // 3), 0)
        x, y = (rng.uniform(-0.1, 0.8, 2) * canvas.side).astype(int)
        canvas.image.paste(faint, (int(x), int(y)), ghost)
    mask = glyph(plan["letter"], canvas.side, plan["stroke"])
    canvas.image.paste(ink, (0, 0), _placed(mask, plan))
    return canvas.done(rng, 0.18)


def _placed(mask: Image.Image, plan: Plan) -> Image.Image:
    side, zoom = mask.size[0], plan["zoom"]
    cos, sin = math.cos(plan["angle"]) / zoom, math.sin(plan["angle"]) / zoom
    a, b, d, e = cos + plan["slant"] * -sin, sin + plan["slant"] * cos, -sin, cos
    x, y = side * (0.5 + plan["shift"][0]), side * (0.5 + plan["shift"][1])
    middle, height = side / 2, 0.47 * side
    matrix = (a, b, middle - a * x - b * y, d, e, height - d * x - e * y)
    return mask.transform(
        (side, side), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )


def datasets() -> list[BuiltinDataset]:
    """Return the letters."""
    names = tuple(f"{case} letter {letter}" for letter, case in PAIRS)
    return [BuiltinDataset("letters", "Letters", "letters", names, plan, draw, GRAMMAR)]
