"""Scenes of several objects: what stands in the landscape times what the sky does."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard, pick
from vlmlayers.data.builtin.canvas import VIVID, Canvas, Colour, jitter, mix, shade

OBJECTS = ("house", "tree", "boat", "car", "tent")
SKIES = ("under the sun", "under the moon", "in the rain", "in the snow")
PAIRS = checkerboard(OBJECTS, SKIES)
GRAMMAR = (
    "a {name}",
    "a {colour} {name}",
    "a {name} and some {extra}",
    "a {size} {colour} {name}",
    "{extra} near a {name}",
    "a picture of a {size} {name}",
)
AIR: dict[str, Colour] = {
    "under the sun": (150, 200, 240),
    "under the moon": (30, 35, 75),
    "in the rain": (120, 130, 145),
    "in the snow": (185, 195, 210),
}


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Choose where the object stands and what else there is."""
    thing, sky = PAIRS[label]
    scale = float(rng.uniform(0.16, 0.32))
    return {
        "thing": thing,
        "sky": sky,
        "scale": scale,
        "x": float(rng.uniform(0.22, 0.78)),
        "horizon": float(rng.uniform(0.5, 0.72)),
        "colour": pick(rng, VIVID),
        "extra": pick(rng, ("bushes", "birds", "hills", "rocks", "clouds")),
        "size": "big" if scale > 0.24 else "little",
        "flip": -1.0 if rng.uniform() < 0.5 else 1.0,
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one landscape."""
    sky, horizon = plan["sky"], plan["horizon"]
    air = jitter(rng, AIR[sky], 25)
    canvas = Canvas(size, air).whole()
    night = 0.6 if sky == "under the moon" else 0.15 if sky == "in the rain" else 0.0
    ground = (80, 120, 170) if plan["thing"] == "boat" else (110, 150, 80)
    ground = mix(jitter(rng, ground, 30), (235, 240, 245), 0.6 if sky == "in the snow" else 0.0)
    if sky in SKIES[:2]:
        _disc_in_sky(canvas, sky, air, rng)
    _extras(canvas, plan["extra"], horizon, night, rng)
    canvas.box(0, horizon, 1, 1, mix(ground, (20, 25, 50), night))
    canvas.place(plan["x"], horizon + 0.1, plan["scale"], float(rng.normal(0, 0.05)), plan["flip"])
    _THINGS[plan["thing"]](canvas, mix(shade(rng, plan["colour"]), (20, 25, 50), night * 0.7), rng)
    _fall(canvas.whole(), sky, rng)
    return canvas.done(rng, 0.12)


def _disc_in_sky(canvas: Canvas, sky: str, air: Colour, rng: np.random.Generator) -> None:
    x, y, r = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.25), rng.uniform(0.06, 0.11)
    if sky == "under the sun":
        canvas.disc(x, y, r, jitter(rng, (250, 215, 70), 20))
        return
    canvas.disc(x, y, r, jitter(rng, (235, 235, 215), 15))
    if rng.uniform() < 0.7:
        canvas.disc(x + 0.5 * r, y - 0.2 * r, 0.9 * r, air)
    for star_x, star_y in rng.uniform(0, 1, (8, 2)):
        canvas.disc(star_x, 0.5 * star_y, 0.008, (235, 235, 220))


def _extras(
    canvas: Canvas, extra: str, horizon: float, night: float, rng: np.random.Generator
) -> None:
    for x, y, r in rng.uniform(0, 1, (int(rng.integers(2, 5)), 3)):
        if extra == "hills":
            canvas.disc(
                x,
                horizon + 0.05,
                0.15 + 0.15 * r,
                mix(jitter(rng, (120, 130, 120), 20), (20, 25, 50), night),
            )
        elif extra == "bushes":
            canvas.disc(x, horizon, 0.04 + 0.05 * r, mix((70, 115, 70), (20, 25, 50), night))
        elif extra == "rocks":
            canvas.disc(x, horizon, 0.03 + 0.05 * r, jitter(rng, (125, 120, 118), 20), tall=0.6)
        elif extra == "clouds":
            for k in (-1, 0, 1):
                canvas.disc(
                    x + 0.07 * k,
                    0.1 + 0.25 * y,
                    0.06 + 0.02 * r,
                    mix((225, 225, 230), (20, 25, 50), night),
                    tall=0.7,
                )
        else:
            top, wide = 0.1 + 0.3 * y, 0.03 + 0.03 * r
            canvas.line(
                [(x - wide, top - 0.02), (x, top), (x + wide, top - 0.02)], (40, 40, 45), 0.012
            )


def _fall(canvas: Canvas, sky: str, rng: np.random.Generator) -> None:
    if sky == "in the rain":
        lean, length = rng.uniform(-0.04, 0.04), rng.uniform(0.06, 0.12)
        for x, y in rng.uniform(0, 1, (int(rng.integers(25, 50)), 2)):
            canvas.line([(x, y), (x + lean, y + length)], (185, 205, 230), 0.008)
    elif sky == "in the snow":
        for x, y, r in rng.uniform(0, 1, (int(rng.integers(25, 50)), 3)):
            canvas.disc(x, y, 0.007 + 0.012 * r, (250, 250, 252))


def _house(canvas: Canvas, colour: Colour, rng: np.random.Generator) -> None:
    canvas.box(-0.8, -0.9, 0.8, 0.1, colour)
    canvas.polygon(
        [(-1, -0.9), (0, -float(rng.uniform(1.4, 1.8))), (1, -0.9)], mix(colour, (60, 30, 25), 0.6)
    )
    canvas.box(-0.2, -0.5, 0.15, 0.1, mix(colour, (40, 25, 20), 0.75))
    for x in (-0.55, 0.5):
        canvas.box(x - 0.15, -0.65, x + 0.15, -0.35, (245, 235, 160))


def _tree(canvas: Canvas, colour: Colour, rng: np.random.Generator) -> None:
    canvas.box(-0.14, -0.9, 0.14, 0.15, (100, 70, 45))
    leaves = mix(colour, (60, 130, 60), 0.6)
    if rng.uniform() < 0.5:
        for low in (-0.4, -0.9, -1.4):
            half = 0.85 + 0.35 * (low + 0.4)
            canvas.polygon([(-half, low), (0, low - 0.8), (half, low)], leaves)
    else:
        for x, y in ((-0.4, -1.0), (0.4, -1.0), (0, -1.4)):
            canvas.disc(x, y, 0.55, leaves)


def _boat(canvas: Canvas, colour: Colour, rng: np.random.Generator) -> None:
    canvas.polygon([(-1.1, -0.2), (1.1, -0.2), (0.7, 0.3), (-0.75, 0.3)], colour)
    canvas.box(-0.06, -1.8, 0.06, -0.2, (95, 70, 50))
    canvas.polygon([(0.1, -1.75), (0.95, -0.4), (0.1, -0.4)], (240, 235, 225))
    if rng.uniform() < 0.5:
        canvas.polygon([(-0.1, -1.6), (-0.75, -0.4), (-0.1, -0.4)], (235, 225, 210))


def _car(canvas: Canvas, colour: Colour, rng: np.random.Generator) -> None:
    roof = float(rng.uniform(0.85, 1.1))
    canvas.box(-1.2, -0.5, 1.2, -0.02, colour)
    canvas.polygon([(-0.75, -0.5), (-0.45, -roof), (0.4, -roof), (0.8, -0.5)], colour)
    canvas.polygon(
        [(-0.55, -0.53), (-0.35, -roof + 0.12), (0.3, -roof + 0.12), (0.58, -0.53)], (190, 215, 230)
    )
    for x in (-0.7, 0.7):
        canvas.disc(x, 0.0, 0.27, (30, 30, 32))
        canvas.disc(x, 0.0, 0.11, (150, 150, 150))


def _tent(canvas: Canvas, colour: Colour, rng: np.random.Generator) -> None:
    peak = float(rng.uniform(1.2, 1.6))
    canvas.polygon([(-1.1, 0.1), (0, -peak), (1.1, 0.1)], colour)
    canvas.polygon([(-0.32, 0.1), (0, -0.75 * peak), (0.32, 0.1)], mix(colour, (20, 15, 15), 0.7))
    for x in (-1, 1):
        canvas.line([(0, -peak), (1.35 * x, 0.15)], (230, 230, 225), 0.03)


_THINGS = {"house": _house, "tree": _tree, "boat": _boat, "car": _car, "tent": _tent}


def datasets() -> list[BuiltinDataset]:
    """Return the scenes."""
    names = tuple(f"{thing} {sky}" for thing, sky in PAIRS)
    return [
        BuiltinDataset("scenes", "Scenes of several objects", "scenes", names, plan, draw, GRAMMAR)
    ]
