"""Flags in the wind: field colour times emblem."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard, pick
from vlmlayers.data.builtin.canvas import Canvas, Colour, blemish, coordinates, shade
from vlmlayers.data.builtin.shapes import form

FIELDS = ("red", "blue", "green", "yellow")
EMBLEMS = ("stripes", "a cross", "a diagonal band", "a disc", "a corner square", "a star")
PAIRS = checkerboard(EMBLEMS, FIELDS)
GRAMMAR = (
    "a {name} in the wind",
    "a {name} under a {sky} sky",
    "a {size} {name}",
    "a {name}, the emblem is {second}",
    "a {size} {name} under a {sky} sky",
)
SKIES: dict[str, Colour] = {
    "clear": (120, 175, 230),
    "cloudy": (185, 190, 195),
    "dark": (45, 50, 75),
    "evening": (225, 160, 120),
}


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Choose the second colour, the wind and the sky."""
    emblem, colour = PAIRS[label]
    width = float(rng.uniform(0.45, 0.95))
    height = width * float(rng.uniform(0.55, 0.8))
    return {
        "emblem": emblem,
        "field": colour,
        "width": width,
        "height": height,
        "second": str(pick(rng, [c for c in (*FIELDS, "white", "black", "orange") if c != colour])),
        "sky": str(pick(rng, tuple(SKIES))),
        "size": "large" if width > 0.7 else "small",
        "left": float(rng.uniform(0.02, 0.98 - width)),
        "top": float(rng.uniform(0.02, 0.98 - height)),
        "wave": float(rng.uniform(0.0, 0.07)),
        "turns": float(rng.uniform(0.6, 1.8)),
        "phase": float(rng.uniform(0, 2 * math.pi)),
        "skew": float(rng.normal(0, 0.15)),
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one flag flat, then bend it over the sky."""
    cloth = Canvas(size, shade(rng, plan["field"], 30)).whole()
    _emblem(cloth, plan["emblem"], shade(rng, plan["second"], 30), rng)
    ground = Canvas(size, shade(rng, "gray")).whole()
    ground.box(
        0,
        0,
        1,
        1,
        tuple(
            int(c)
            for c in np.clip(  # type: ignore[arg-type]
                np.array(SKIES[plan["sky"]]) + rng.normal(0, 12, 3), 0, 255
            )
        ),
    )
    ground.clutter(rng, [shade(rng, "white"), shade(rng, "gray")], int(rng.integers(0, 7)))
    pole = plan["left"] - 0.015
    ground.box(pole, max(0.0, plan["top"] - 0.04), pole + 0.025, 1, shade(rng, "brown"))
    flat, sky = (
        np.asarray(cloth.image.reduce(2) if cloth.side != size else cloth.image),
        np.array(ground.image.reduce(2) if ground.side != size else ground.image),
    )
    x, y = coordinates(size)
    u = (x - plan["left"]) / plan["width"]
    bend = plan["wave"] * u * np.sin(2 * math.pi * plan["turns"] * u + plan["phase"])
    v = (y - plan["top"] - bend - plan["skew"] * (x - 0.5)) / plan["height"]
    inside = (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
    u = np.broadcast_to(u, v.shape)
    rows, columns = (v[inside] * size).astype(int), (u[inside] * size).astype(int)
    light = 1 + 3 * plan["wave"] * np.cos(2 * math.pi * plan["turns"] * u[inside] + plan["phase"])
    sky[inside] = np.clip(flat[rows, columns] * light[:, None], 0, 255).astype(np.uint8)
    return blemish(rng, Image.fromarray(sky), 0.16)


def _emblem(cloth: Canvas, emblem: str, ink: Colour, rng: np.random.Generator) -> None:
    wide = float(rng.uniform(0.07, 0.13))
    if emblem == "stripes":
        count = int(rng.integers(2, 5))
        for k in range(count):
            top = (2 * k + 1) / (2 * count + 1)
            cloth.box(0, top, 1, top + 1 / (2 * count + 1), ink)
    elif emblem == "a cross":
        middle = float(rng.uniform(0.33, 0.55))
        cloth.box(0, 0.5 - wide, 1, 0.5 + wide, ink)
        cloth.box(middle - 0.8 * wide, 0, middle + 0.8 * wide, 1, ink)
    elif emblem == "a diagonal band":
        ends = [(-0.2, 1.2), (1.2, -0.2)] if rng.uniform() < 0.5 else [(-0.2, -0.2), (1.2, 1.2)]
        cloth.line(ends, ink, 2.2 * wide)
    elif emblem == "a corner square":
        cloth.box(0, 0, float(rng.uniform(0.35, 0.5)), float(rng.uniform(0.4, 0.55)), ink)
    else:
        cloth.place(
            float(rng.uniform(0.38, 0.6)),
            float(rng.uniform(0.42, 0.58)),
            2.4 * wide,
            float(rng.normal(0, 0.1)),
            0.7,
        )
        cloth.polygon(form("circle" if emblem == "a disc" else "star"), ink)


def datasets() -> list[BuiltinDataset]:
    """Return the flags."""
    names = tuple(f"{colour} flag with {emblem}" for emblem, colour in PAIRS)
    return [BuiltinDataset("flags", "Flags", "flags", names, plan, draw, GRAMMAR)]
