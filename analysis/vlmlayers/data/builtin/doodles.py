"""Doodles by two hands whose styles and classes overlap: few pictures say for sure whose they are.

Thickness, wobble, filling and paper of a doodle come from normal distributions that the two hands
share up to a shift, and half of the classes are drawn by both, so that even the best classifier of
hands errs: curves of dataset accuracy stay below 1 in both towers. The miniature CLIP has not seen
doodles in pretraining.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard
from vlmlayers.data.builtin.canvas import Canvas, Colour, Points, jitter, mix, shade
from vlmlayers.data.builtin.shapes import form

FORMS = {
    "pen": ("star", "heart", "circle", "arrow"),
    "brush": ("star", "heart", "cross", "hexagon"),
}
COLOURS = ("red", "blue", "green", "purple")
PAIRS = {hand: checkerboard(forms, COLOURS) for hand, forms in FORMS.items()}
SIDE = {"pen": -1.0, "brush": 1.0}
SHIFT = 0.6  # of each trait, in its standard deviations, between a hand and the middle of both
GRAMMAR = ("a doodle of a {name}", "a {name}", "a {name} drawn with a {hand}")
LIGHT: Colour = (232, 228, 214)
DARK: Colour = (70, 70, 84)
STEP = 0.25  # length of the pieces whose ends a hand shakes, of half a form's width


def plan(label: int, rng: np.random.Generator, hand: str) -> Plan:
    """Choose place, size and the traits of a hand."""
    kind, colour = PAIRS[hand][label]
    width, wobble, tone, filled = rng.standard_normal(4) + SHIFT * SIDE[hand]
    scale = float(rng.uniform(0.2, 0.36))
    room = 0.5 - 1.15 * scale
    x, y = rng.uniform(-room, room, 2) + 0.5
    return {
        "form": kind,
        "colour": colour,
        "hand": hand,
        "scale": scale,
        "x": float(x),
        "y": float(y),
        "angle": float(rng.normal(0, 0.3)),
        "stretch": float(rng.uniform(0.75, 1.3)),
        "width": float(np.clip(0.04 + 0.012 * width, 0.015, 0.08)),
        "wobble": float(np.clip(0.05 + 0.02 * wobble, 0.0, 0.12)),
        "tone": float(np.clip(0.3 + 0.15 * tone, 0.0, 0.8)),
        "filled": bool(filled > 0),
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one form by a shaking hand, over smears of other colours."""
    paper = mix(jitter(rng, LIGHT, 18), jitter(rng, DARK, 18), plan["tone"])
    ink = shade(rng, plan["colour"], 45)
    smears = [mix(paper, shade(rng, name), 0.6) for name in COLOURS]
    canvas = Canvas(size, paper)
    canvas.clutter(rng, smears, int(rng.integers(4, 12)))
    canvas.place(plan["x"], plan["y"], plan["scale"], plan["angle"], plan["stretch"])
    outline = _shaken(form(plan["form"]), plan["wobble"], rng)
    if plan["filled"]:
        canvas.polygon(outline, mix(paper, ink, 0.8))
    canvas.line(outline, ink, plan["width"] / plan["scale"], closed=True)
    return canvas.done(rng, 0.14)


def _shaken(points: Points, wobble: float, rng: np.random.Generator) -> Points:
    """Return a closed outline cut into pieces of at most `STEP`, each end moved a little."""
    line: list[tuple[float, float]] = []
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]]):
        count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / STEP))
        line += [(x0 + (x1 - x0) * k / count, y0 + (y1 - y0) * k / count) for k in range(count)]
    moved = np.asarray(line) + wobble * rng.standard_normal((len(line), 2))
    return [(float(x), float(y)) for x, y in moved]


def datasets() -> list[BuiltinDataset]:
    """Return the doodles of both hands."""
    return [
        BuiltinDataset(
            f"doodles_{hand}",
            f"Doodles, {hand}",
            "doodles",
            tuple(f"{colour} {kind}" for kind, colour in pairs),
            partial(plan, hand=hand),
            draw,
            GRAMMAR,
            unseen=True,
        )
        for hand, pairs in PAIRS.items()
    ]
