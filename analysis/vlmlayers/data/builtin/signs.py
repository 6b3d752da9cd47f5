"""Road signs at the roadside: plate times symbol."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard, pick
from vlmlayers.data.builtin.canvas import Canvas, Colour, Points, mix, shade, unit_circle
from vlmlayers.data.builtin.shapes import form

PLATES = ("round", "triangular", "square", "diamond", "octagonal")
SYMBOLS = ("an arrow", "a bar", "dots", "a zigzag")
PAIRS = checkerboard(PLATES, SYMBOLS)
GRAMMAR = (
    "a {name} by the road",
    "a {colour} {name}",
    "a {name} at {time}",
    "a {size} {colour} {name}",
    "a {size} {name} at {time}",
)
TURN = math.pi / 8
OCTAGON: Points = [
    (math.cos(TURN + k * math.pi / 4) * 1.05, math.sin(TURN + k * math.pi / 4) * 1.05)
    for k in range(8)
]
OUTLINES: dict[str, Points] = {
    "round": unit_circle(36),
    "triangular": [(0, -1.05), (1.05, 0.8), (-1.05, 0.8)],
    "square": form("square"),
    "diamond": [(0, -1.15), (1.15, 0), (0, 1.15), (-1.15, 0)],
    "octagonal": OCTAGON,
}


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Choose colours, distance, tilt and time of day."""
    plate, symbol = PAIRS[label]
    scale = float(rng.uniform(0.2, 0.42))
    colour, rim, ink = pick(
        rng,
        (
            ("white", "red", "black"),
            ("yellow", "black", "black"),
            ("blue", "white", "white"),
            ("red", "white", "white"),
            ("orange", "black", "black"),
            ("green", "white", "white"),
        ),
    )
    return {
        "plate": plate,
        "symbol": symbol,
        "colour": colour,
        "rim": rim,
        "ink": ink,
        "scale": scale,
        "size": "near" if scale > 0.31 else "distant",
        "time": pick(rng, ("day", "night", "dusk")),
        "x": float(rng.uniform(0.3, 0.7)),
        "y": float(rng.uniform(0.3, 0.55)),
        "angle": float(rng.normal(0, 0.12)),
        "stretch": float(rng.uniform(0.7, 1.1)),
        "turn": pick(rng, (0.0, math.pi, -math.pi / 2)),
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one sign before a road and some trees."""
    dim = {"day": 0.0, "dusk": 0.3, "night": 0.65}[plan["time"]]
    canvas = Canvas(size, _dim((150, 190, 225), dim, rng)).whole()
    horizon = float(rng.uniform(0.45, 0.8))
    canvas.box(0, horizon, 1, 1, _dim((95, 130, 75), dim, rng))
    for x, radius in rng.uniform(0, 1, (int(rng.integers(1, 5)), 2)):
        canvas.disc(x, horizon, 0.08 + 0.12 * radius, _dim((55, 100, 60), dim, rng), tall=1.3)
    road = float(rng.uniform(-0.2, 0.5))
    canvas.polygon(
        [(road + 0.3, horizon), (road + 0.38, horizon), (road + 0.9, 1), (road, 1)],
        _dim((110, 110, 115), dim, rng),
    )
    canvas.box(plan["x"] - 0.02, plan["y"], plan["x"] + 0.02, 1, shade(rng, "gray"))
    canvas.place(plan["x"], plan["y"], plan["scale"], plan["angle"], plan["stretch"])
    outline = OUTLINES[plan["plate"]]
    canvas.polygon(outline, shade(rng, plan["rim"]))
    inset = float(rng.uniform(0.78, 0.9))
    canvas.polygon([(inset * x, inset * y) for x, y in outline], shade(rng, plan["colour"]))
    low = 0.18 if plan["plate"] == "triangular" else 0.0
    _symbol(canvas, plan, low, shade(rng, plan["ink"]), rng)
    return canvas.done(rng, 0.16)


def _dim(colour: Colour, share: float, rng: np.random.Generator) -> Colour:
    off = rng.uniform(-18, 18, 3)
    near = tuple(int(min(255, max(0, c + o))) for c, o in zip(colour, off))
    return mix(near, (15, 18, 40), share)  # type: ignore[arg-type]


def _symbol(canvas: Canvas, plan: Plan, low: float, ink: Colour, rng: np.random.Generator) -> None:
    size = float(rng.uniform(0.42, 0.55)) * (0.82 if plan["plate"] == "triangular" else 1.0)
    if plan["symbol"] == "an arrow":
        cos, sin = math.cos(plan["turn"]), math.sin(plan["turn"])
        canvas.polygon(
            [
                (size * (cos * x - sin * y), low + size * (sin * x + cos * y))
                for x, y in form("arrow")
            ],
            ink,
        )
    elif plan["symbol"] == "a bar":
        canvas.box(-size * 1.1, low - 0.16, size * 1.1, low + 0.16, ink)
    elif plan["symbol"] == "dots":
        for k in (-1, 0, 1):
            canvas.disc(size * k * 0.9, low, 0.17, ink)
    else:
        points = [(size * (k - 2) * 0.55, low + 0.26 * (1 if k % 2 else -1)) for k in range(5)]
        canvas.line(points, ink, 0.14)


def datasets() -> list[BuiltinDataset]:
    """Return the signs."""
    names = tuple(f"{plate} sign with {symbol}" for plate, symbol in PAIRS)
    return [BuiltinDataset("signs", "Road signs", "signs", names, plan, draw, GRAMMAR)]
