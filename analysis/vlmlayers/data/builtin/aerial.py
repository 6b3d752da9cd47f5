"""Views from above: kind of land times what lies in it."""

from __future__ import annotations

import itertools
import math

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard, pick
from vlmlayers.data.builtin.canvas import Canvas, Colour, jitter

LANDS: dict[str, tuple[Colour, Colour]] = {
    "forest": ((45, 85, 45), (30, 62, 36)),
    "farmland": ((150, 160, 80), (115, 135, 60)),
    "desert": ((205, 175, 125), (185, 150, 100)),
    "snow": ((225, 230, 235), (200, 208, 218)),
}
FEATURES = ("river", "road", "lake", "village", "airport")
PAIRS = checkerboard(FEATURES, tuple(LANDS))
GRAMMAR = (
    "{name} seen from above",
    "aerial view of a {name}",
    "a {name} from the air",
    "satellite image of a {name}, {light} light",
    "a {name} in {light} light",
)


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Choose direction, height of flight and light."""
    feature, land = PAIRS[label]
    return {
        "feature": feature,
        "land": land,
        "angle": float(rng.uniform(0, 2 * math.pi)),
        "x": float(rng.uniform(0.35, 0.65)),
        "y": float(rng.uniform(0.35, 0.65)),
        "scale": float(rng.uniform(0.7, 1.3)),
        "light": pick(rng, ("morning", "noon")),
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one stretch of land."""
    ground, dark = LANDS[plan["land"]]
    ground = jitter(rng, ground, 18)
    canvas = Canvas(size, ground)
    _land(canvas, plan["land"], ground, dark, rng)
    canvas.place(plan["x"], plan["y"], plan["scale"], plan["angle"])
    _FEATURES[plan["feature"]](canvas, rng)
    return canvas.done(rng, 0.2)


def _land(
    canvas: Canvas, land: str, ground: Colour, dark: Colour, rng: np.random.Generator
) -> None:
    canvas.place(0.5, 0.5, 1.0, float(rng.uniform(0, math.pi)))
    if land == "farmland":
        cuts = np.sort(rng.uniform(-0.75, 0.75, 5))
        for left, right in itertools.pairwise(cuts):
            top = float(rng.uniform(-0.4, 0.4))
            for low, high in ((-0.8, top), (top, 0.8)):
                tint = pick(rng, (ground, dark, (175, 150, 80), (95, 125, 55)))
                canvas.box(left, low, right, high, jitter(rng, tint, 20))
    elif land == "desert":
        for y in np.arange(-0.7, 0.75, float(rng.uniform(0.11, 0.2))):
            bend = rng.normal(0, 0.05, 6)
            canvas.line(
                [(-0.8 + 0.32 * k, y + bend[k]) for k in range(6)], jitter(rng, dark, 12), 0.03
            )
    else:
        count = 70 if land == "forest" else 12
        radius = 0.045 if land == "forest" else 0.14
        for x, y, r in rng.uniform(-0.7, 0.7, (count, 3)):
            canvas.disc(x, y, radius * (1 + 0.5 * r), jitter(rng, dark, 14))


def _path(rng: np.random.Generator, bend: float) -> list[tuple[float, float]]:
    first, second, phase = rng.uniform(-1, 1, 3)
    return [
        (x, bend * (first * math.sin(5 * x + 3 * phase) + 0.6 * second * math.sin(9 * x)))
        for x in np.linspace(-1.2, 1.2, 22).tolist()
    ]


def _river(canvas: Canvas, rng: np.random.Generator) -> None:
    path = _path(rng, 0.2)
    canvas.line(path, jitter(rng, (60, 105, 150), 25), float(rng.uniform(0.07, 0.14)))
    if rng.uniform() < 0.4:
        canvas.line(
            [(x * 0.5, 0.8 * x + 0.1) for x, _ in path[11:]], jitter(rng, (60, 105, 150), 25), 0.05
        )


def _road(canvas: Canvas, rng: np.random.Generator) -> None:
    path, width = _path(rng, 0.05), float(rng.uniform(0.06, 0.11))
    canvas.line(path, jitter(rng, (105, 105, 108), 20), width)
    canvas.line(path, jitter(rng, (225, 220, 190), 20), 0.18 * width)
    for x, y in path[2::4]:
        off = 0.25 * width
        canvas.box(
            x - 0.02, y + off - 0.012, x + 0.02, y + off + 0.012, jitter(rng, (180, 60, 60), 60)
        )


def _lake(canvas: Canvas, rng: np.random.Generator) -> None:
    a, b, p = rng.uniform(0.05, 0.2), rng.uniform(0.03, 0.12), rng.uniform(0, 6)
    turns = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    radius = rng.uniform(0.24, 0.36) * (1 + a * np.sin(2 * turns + p) + b * np.sin(3 * turns))
    shore = list(zip((1.2 * radius * np.cos(turns)).tolist(), (radius * np.sin(turns)).tolist()))
    canvas.polygon(shore, jitter(rng, (60, 105, 150), 25))


def _village(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.line([(-0.6, 0.0), (0.6, 0.0)], jitter(rng, (150, 145, 135), 15), 0.035)
    for x in np.linspace(-0.36, 0.36, int(rng.integers(4, 7))):
        for y in (-0.24, -0.1, 0.1, 0.24):
            if rng.uniform() < 0.85:
                wide, high = rng.uniform(0.03, 0.055, 2)
                x0, y0 = x + rng.normal(0, 0.012), y + rng.normal(0, 0.015)
                roof = jitter(rng, pick(rng, ((165, 75, 55), (120, 110, 105), (190, 120, 80))), 20)
                canvas.box(x0 - wide, y0 - high, x0 + wide, y0, roof)
                canvas.box(x0 - wide, y0, x0 + wide, y0 + high, tuple(c * 3 // 4 for c in roof))  # type: ignore[arg-type]


def _airport(canvas: Canvas, rng: np.random.Generator) -> None:
    asphalt, paint = jitter(rng, (90, 90, 95), 18), jitter(rng, (235, 235, 235), 12)
    gap = float(rng.uniform(0.16, 0.24))
    canvas.box(-0.55, -0.06, 0.55, 0.06, asphalt)
    canvas.box(-0.4, gap - 0.025, 0.4, gap + 0.025, asphalt)
    for x in (-0.36, 0.36):
        canvas.box(x - 0.025, 0, x + 0.025, gap, asphalt)
    for x in np.linspace(-0.5, 0.42, 7):
        canvas.box(x, -0.01, x + 0.07, 0.01, paint)
    for x in rng.uniform(-0.3, 0.3, int(rng.integers(1, 4))):
        canvas.line([(x, gap + 0.06), (x, gap + 0.18)], paint, 0.03)
        canvas.line([(x - 0.06, gap + 0.12), (x + 0.06, gap + 0.12)], paint, 0.025)


_FEATURES = {
    "river": _river,
    "road": _road,
    "lake": _lake,
    "village": _village,
    "airport": _airport,
}


def datasets() -> list[BuiltinDataset]:
    """Return the views from above."""
    words = {"forest": "forest", "farmland": "farmland", "desert": "desert", "snow": "snowy"}
    names = tuple(f"{words[land]} {feature}" for feature, land in PAIRS)
    return [BuiltinDataset("aerial", "Views from above", "aerial", names, plan, draw, GRAMMAR)]
