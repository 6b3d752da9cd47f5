"""Geometric shapes in four styles with the same classes: domain shift under control."""

from __future__ import annotations

import math
from functools import cache, partial

import numpy as np
from PIL import Image, ImageDraw

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard, pick
from vlmlayers.data.builtin.canvas import (
    VIVID,
    Canvas,
    Points,
    blemish,
    coordinates,
    mix,
    shade,
    unit_circle,
)

FORMS = ("circle", "square", "triangle", "star", "heart", "cross", "hexagon", "arrow")
PARTS = ("", " with a hole")
PAIRS = checkerboard(FORMS, PARTS)
STYLES = ("filled", "outline", "textured", "inverted")
GRAMMAR = (
    "a {size} {colour} {name}",
    "a {name} drawn in {colour}",
    "a {style} {name}",
    "a {size} {name} on {paper} paper",
    "a {colour} {name} on {paper} paper",
)
STYLE_WORDS = {
    "filled": "solid",
    "outline": "outlined",
    "textured": "patterned",
    "inverted": "bright",
}


@cache
def form(name: str) -> Points:
    """Return the outline of a form within the square from -1 to 1."""
    if name == "circle":
        return unit_circle(40)
    if name == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if name == "triangle":
        return [(0, -1), (0.95, 0.75), (-0.95, 0.75)]
    if name == "hexagon":
        return unit_circle(6)
    if name == "star":
        turns = [(k * math.pi / 5 - math.pi / 2, 1.05 if k % 2 == 0 else 0.48) for k in range(10)]
        return [(r * math.cos(t), r * math.sin(t)) for t, r in turns]
    if name == "heart":
        turn = [2 * math.pi * k / 36 for k in range(36)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 16,
            )
            for t in turn
        ]
    if name == "cross":
        a, b = 0.36, 0.98
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    return [
        (-1, -0.42),
        (0.05, -0.42),
        (0.05, -0.95),
        (1, 0),
        (0.05, 0.95),
        (0.05, 0.42),
        (-1, 0.42),
    ]


def plan(label: int, rng: np.random.Generator, style: str) -> Plan:
    """Choose place, size, tilt and colours."""
    kind, part = PAIRS[label]
    scale = float(rng.uniform(0.17, 0.4))
    room = 0.5 - 0.8 * scale
    dark = style in ("filled", "outline")
    ink = pick(
        rng,
        ("black", "blue", "red", "purple", "brown", "green")
        if dark
        else ("white", "yellow", "pink", "orange"),
    )
    paper = pick(rng, ("white", "yellow", "pink") if dark else ("black", "blue", "green", "brown"))
    if style == "textured":
        ink, paper = rng.choice(VIVID, 2, replace=False)
    if ink == paper:
        paper = "white" if dark else "black"
    x, y = rng.uniform(-room, room, 2) + 0.5
    return {
        "form": kind,
        "hole": bool(part),
        "scale": scale,
        "x": float(x),
        "y": float(y),
        "angle": float(rng.normal(0, 0.3)),
        "stretch": float(rng.uniform(0.75, 1.3)),
        "colour": str(ink),
        "paper": str(paper),
        "style": STYLE_WORDS[style],
        "size": "large" if scale > 0.285 else "small",
    }


def draw(plan: Plan, rng: np.random.Generator, size: int, style: str) -> Image.Image:
    """Draw one shape in a style."""
    if style == "textured":
        return _textured(plan, rng, size)
    paper, ink = shade(rng, plan["paper"]), shade(rng, plan["colour"])
    canvas = Canvas(size, paper)
    canvas.clutter(rng, (mix(paper, ink, 0.5), mix(paper, ink, 0.8)), int(rng.integers(2, 9)))
    canvas.place(plan["x"], plan["y"], plan["scale"], plan["angle"], plan["stretch"])
    outline = form(plan["form"])
    inner = [(0.42 * x, 0.42 * y) for x, y in outline]
    if style == "outline":
        width = float(rng.uniform(0.05, 0.16))
        canvas.line(outline, ink, width, closed=True)
        if plan["hole"]:
            canvas.line(inner, ink, width, closed=True)
    else:
        canvas.polygon(outline, ink)
        if plan["hole"]:
            canvas.polygon(inner, paper)
    return canvas.done(rng, 0.16)


def _textured(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Fill shape and ground with two patterns: the edge is seen, no line is drawn."""
    canvas = Canvas(size, (0, 0, 0))
    canvas.image = Image.new("L", canvas.image.size, 0)
    canvas.pen = ImageDraw.Draw(canvas.image)
    canvas.place(plan["x"], plan["y"], plan["scale"], plan["angle"], plan["stretch"])
    outline = form(plan["form"])
    canvas.pen.polygon(canvas._map(outline), fill=255)
    if plan["hole"]:
        canvas.pen.polygon(canvas._map([(0.42 * x, 0.42 * y) for x, y in outline]), fill=0)
    mask = canvas.image.resize((size, size), Image.Resampling.BOX)
    front = _pattern(rng, size, shade(rng, plan["colour"]))
    back = _pattern(rng, size, shade(rng, plan["paper"]))
    return blemish(rng, Image.composite(front, back, mask), 0.10)


def _pattern(rng: np.random.Generator, size: int, colour: tuple[int, int, int]) -> Image.Image:
    x, y = coordinates(size)
    angle, pitch = rng.uniform(0, math.pi), rng.uniform(16, 60)
    wave = np.sin(pitch * (math.cos(angle) * x + math.sin(angle) * y))
    if rng.uniform() < 0.5:
        wave = wave * np.sin(pitch * (math.cos(angle) * y - math.sin(angle) * x))
    light = (1 + 0.35 * wave)[..., None] * np.asarray(colour, np.float32)
    return Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))


def datasets() -> list[BuiltinDataset]:
    """Return the shapes in every style."""
    return [
        BuiltinDataset(
            f"shapes_{style}",
            f"Shapes, {style}",
            "shapes",
            tuple(kind + part for kind, part in PAIRS),
            partial(plan, style=style),
            partial(draw, style=style),
            GRAMMAR,
        )
        for style in STYLES
    ]
