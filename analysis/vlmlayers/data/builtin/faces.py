"""Drawn faces: expression times what is worn."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard, pick
from vlmlayers.data.builtin.canvas import VIVID, Canvas, Colour, jitter, shade

MOODS = ("happy", "sad", "angry", "surprised", "sleepy")
WEAR = ("glasses", "a hat", "a beard", "earrings")
PAIRS = checkerboard(MOODS, WEAR)
SKINS: dict[str, Colour] = {
    "yellow": (245, 205, 70),
    "pale": (245, 215, 185),
    "tan": (215, 165, 120),
    "brown": (140, 95, 65),
    "green": (135, 190, 110),
}
GRAMMAR = (
    "a {name}",
    "a {skin} {name}",
    "a {size} {name}",
    "a {name} on a {paper} ground",
    "a {size} {skin} {name}",
    "a drawing of a {name}",
)


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Choose skin, place, tilt and proportions."""
    mood, wear = PAIRS[label]
    scale = float(rng.uniform(0.24, 0.4))
    x, y = rng.uniform(-1, 1, 2) * (0.5 - 1.05 * scale) + 0.5
    return {
        "mood": mood,
        "wear": wear,
        "skin": pick(rng, tuple(SKINS)),
        "scale": scale,
        "paper": pick(rng, ("white", "blue", "pink", "gray", "purple", "orange")),
        "size": "big" if scale > 0.32 else "little",
        "x": float(x),
        "y": float(y) + 0.03,
        "angle": float(rng.normal(0, 0.2)),
        "stretch": float(rng.uniform(0.8, 1.1)),
        "eyes": float(rng.uniform(0.3, 0.44)),
        "eye": float(rng.uniform(0.09, 0.15)),
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one face."""
    paper, skin = shade(rng, plan["paper"], 30), jitter(rng, SKINS[plan["skin"]], 18)
    dark = shade(rng, "black", 18)
    canvas = Canvas(size, paper)
    canvas.clutter(rng, [shade(rng, pick(rng, VIVID)), dark], int(rng.integers(1, 7)))
    canvas.place(plan["x"], plan["y"], plan["scale"], plan["angle"], plan["stretch"])
    if rng.uniform() < 0.5:
        canvas.disc(0, -0.12, 1.08, shade(rng, pick(rng, ("brown", "black", "orange", "gray"))))
    canvas.disc(0, 0, 1, skin, tall=float(rng.uniform(0.95, 1.1)))
    if plan["wear"] == "a beard":
        _beard(canvas, rng)
    _eyes(canvas, plan, dark)
    _mouth(canvas, plan["mood"], dark, rng)
    _worn(canvas, plan, dark, rng)
    return canvas.done(rng, 0.16)


def _eyes(canvas: Canvas, plan: Plan, dark: Colour) -> None:
    for side in (-1, 1):
        x, r, mood = side * plan["eyes"], plan["eye"], plan["mood"]
        if mood == "sleepy":
            canvas.line([(x - 1.4 * r, -0.15), (x, -0.08), (x + 1.4 * r, -0.15)], dark, 0.08)
            continue
        if mood == "surprised":
            canvas.disc(x, -0.2, 1.7 * r, (245, 245, 245))
        canvas.disc(x, -0.2, r, dark, tall=1.2)
        if mood == "angry":
            canvas.line([(x + side * 0.2, -0.55), (x - side * 0.2, -0.36)], dark, 0.1)
        elif mood == "sad":
            canvas.line([(x + side * 0.2, -0.4), (x - side * 0.18, -0.54)], dark, 0.07)


def _mouth(canvas: Canvas, mood: str, dark: Colour, rng: np.random.Generator) -> None:
    wide, low = float(rng.uniform(0.32, 0.5)), float(rng.uniform(0.38, 0.48))
    if mood == "surprised":
        canvas.disc(0, low + 0.04, 0.17, dark, tall=1.3)
        return
    bend = {"happy": 0.28, "sad": -0.26, "angry": -0.1, "sleepy": 0.03}[mood]
    points = [
        (wide * t, low + bend * (1 - t * t) - bend / 2) for t in np.linspace(-1, 1, 9).tolist()
    ]
    if mood == "happy" and rng.uniform() < 0.5:
        canvas.polygon(points, dark)
    else:
        canvas.line(points, dark, float(rng.uniform(0.07, 0.12)))


def _beard(canvas: Canvas, rng: np.random.Generator) -> None:
    turns = np.linspace(0.02, math.pi - 0.02, 14).tolist()
    outer = [(1.02 * math.cos(t), 1.12 * math.sin(t)) for t in turns]
    inner = [(0.72 * math.cos(t), 0.14 + 0.1 * math.sin(t)) for t in reversed(turns)]
    canvas.polygon(outer + inner, shade(rng, pick(rng, ("brown", "gray", "black", "orange")), 20))
    canvas.disc(0, 0.44, 0.46, jitter(rng, (225, 170, 140), 15), tall=0.5)


def _worn(canvas: Canvas, plan: Plan, dark: Colour, rng: np.random.Generator) -> None:
    colour = shade(rng, pick(rng, VIVID))
    if plan["wear"] == "glasses":
        circle = [
            (math.cos(2 * math.pi * k / 14), math.sin(2 * math.pi * k / 14)) for k in range(14)
        ]
        for side in (-1, 1):
            canvas.line(
                [(side * plan["eyes"] + 0.29 * u, -0.2 + 0.26 * v) for u, v in circle],
                colour,
                0.07,
                closed=True,
            )
        canvas.line([(-0.12, -0.22), (0.12, -0.22)], colour, 0.07)
    elif plan["wear"] == "a hat":
        high = float(rng.uniform(1.2, 1.5))
        canvas.box(-0.65, -high, 0.65, -0.7, colour)
        canvas.box(-1.1, -0.8, 1.1, -0.6, colour)
        canvas.box(-0.65, -0.92, 0.65, -0.8, dark)
    elif plan["wear"] == "earrings":
        for side in (-1, 1):
            canvas.disc(side * 1.0, 0.1, 0.13, jitter(rng, SKINS[plan["skin"]], 18), tall=1.4)
            canvas.disc(side * 1.04, 0.42, 0.15, colour, tall=1.3)


def datasets() -> list[BuiltinDataset]:
    """Return the faces."""
    names = tuple(f"{mood} face with {wear}" for mood, wear in PAIRS)
    return [BuiltinDataset("faces", "Drawn faces", "faces", names, plan, draw, GRAMMAR)]
