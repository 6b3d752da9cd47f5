"""Surface textures: fields of brightness over the whole picture, warped and turned."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard, pick
from vlmlayers.data.builtin.canvas import COLOURS, blemish, coordinates, jitter

Field = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
PALETTES = {
    "warm": (
        ("red", "yellow"),
        ("orange", "brown"),
        ("red", "pink"),
        ("yellow", "brown"),
        ("brown", "pink"),
    ),
    "cool": (
        ("blue", "green"),
        ("blue", "white"),
        ("purple", "blue"),
        ("green", "white"),
        ("green", "purple"),
    ),
    "gray": (("gray", "white"), ("black", "gray"), ("white", "black")),
}
GRAMMAR = (
    "a surface of {name}",
    "{name} up close",
    "a {scale} texture of {name}",
    "{name} on a {light} surface",
    "a {scale} pattern, {name}",
)


def _stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(2 * math.pi * x) * 4


def _checks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(math.pi * x) * np.sin(math.pi * y) * 6


def _dots(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    radius = rng.uniform(0.22, 0.36)
    row = np.floor(y)
    x = x + 0.5 * (row % 2)
    return (radius - np.hypot(x - np.floor(x) - 0.5, y - row - 0.5)) * 12


def _waves(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bend = rng.uniform(0.25, 0.5)
    return np.sin(2 * math.pi * (y + bend * np.sin(2 * math.pi * x * 0.8))) * 3


def _bricks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(1.6 * y)
    across = np.abs(0.8 * x + 0.5 * (row % 2) - np.round(0.8 * x + 0.5 * (row % 2))) * 1.25
    along = np.abs(1.6 * y - np.round(1.6 * y)) / 1.6
    return (np.minimum(across, along) - rng.uniform(0.05, 0.1)) * 22


def _rings(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    off_x, off_y = rng.uniform(-1.0, 1.0, 2)
    return np.sin(2 * math.pi * np.hypot(x - off_x, y - off_y)) * 3


def _speckles(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grid = rng.standard_normal((24, 24)).astype(np.float32)
    column = np.floor(2.2 * x).astype(int) % 24
    row = np.floor(2.2 * y).astype(int) % 24
    inside = 0.45 - np.maximum(np.abs(2.2 * x % 1 - 0.5), np.abs(2.2 * y % 1 - 0.5))
    return np.where(grid[row, column] > 0.3, inside * 14, -3)


def _weave(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    over = (np.floor(x) + np.floor(y)) % 2
    strand = np.where(over == 1, np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5))
    return (0.3 - strand) * 8


FIELDS: dict[str, Field] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "waves": _waves,
    "bricks": _bricks,
    "rings": _rings,
    "speckles": _speckles,
    "weave": _weave,
}
PAIRS = checkerboard(tuple(FIELDS), tuple(PALETTES))


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Choose pitch, direction, warp and the two colours."""
    pattern, palette = PAIRS[label]
    first, second = pick(rng, PALETTES[palette])
    if rng.uniform() < 0.5:
        first, second = second, first
    pitch = float(rng.uniform(2.5, 7))
    return {
        "pattern": pattern,
        "first": first,
        "second": second,
        "pitch": pitch,
        "angle": float(rng.uniform(0, math.pi)),
        "shift": rng.uniform(-9, 9, 2),
        "warp": rng.uniform(0, 0.035, 2),
        "scale": "fine" if pitch > 4.75 else "coarse",
        "light": second,
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one surface."""
    u, v = coordinates(size)
    u = u + plan["warp"][0] * np.sin(9 * v + plan["shift"][0])
    v = v + plan["warp"][1] * np.sin(9 * u + plan["shift"][1])
    cos, sin, pitch = math.cos(plan["angle"]), math.sin(plan["angle"]), plan["pitch"]
    x = pitch * (cos * (u - 0.5) - sin * (v - 0.5)) + (0 if plan["pattern"] == "rings" else 5)
    y = pitch * (sin * (u - 0.5) + cos * (v - 0.5)) + (0 if plan["pattern"] == "rings" else 5)
    field = np.clip(0.5 + 0.5 * FIELDS[plan["pattern"]](x, y, rng), 0, 1)[..., None]
    spread = 14.0 if {plan["first"], plan["second"]} <= {"gray", "white", "black"} else 26.0
    tint = rng.uniform(-spread, spread) if spread < 20 else 0.0
    colours = [
        jitter(rng, tuple(int(c + tint) for c in COLOURS[plan[key]]), 0.4 * spread)  # type: ignore[arg-type]
        for key in ("first", "second")
    ]
    low, high = (np.asarray(colour, np.float32) for colour in colours)
    share = np.float32(rng.uniform(0.45, 1.0))
    pixels = low + (high - low) * share * field.astype(np.float32)
    return blemish(rng, Image.fromarray(pixels.astype(np.uint8)), 0.22)


def datasets() -> list[BuiltinDataset]:
    """Return the textures."""
    names = tuple(f"{palette} {pattern}" for pattern, palette in PAIRS)
    return [BuiltinDataset("textures", "Surface textures", "textures", names, plan, draw, GRAMMAR)]
