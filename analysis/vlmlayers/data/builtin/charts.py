"""Charts: what the marks are times how the values go."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlmlayers.data.builtin.base import BuiltinDataset, Plan, checkerboard
from vlmlayers.data.builtin.canvas import VIVID, Canvas, mix, shade

KINDS = ("bar chart", "line chart", "scatter plot", "area chart", "lollipop chart")
TRENDS = ("rising", "falling", "peaked", "dipping")
PAIRS = checkerboard(KINDS, TRENDS)
GRAMMAR = (
    "a {name} in {colour}",
    "a {name} with {count} values",
    "a {colour} {name}",
    "a {name} on {paper} ground",
    "a {name} with a {grid}",
)


def plan(label: int, rng: np.random.Generator) -> Plan:
    """Choose the values, the frame and the colours."""
    kind, trend = PAIRS[label]
    ink = str(rng.choice(VIVID))
    count = int(rng.integers(6, 13)) if kind != "scatter plot" else int(rng.integers(18, 40))
    at = np.linspace(0, 1, count) if kind != "scatter plot" else rng.uniform(0, 1, count)
    middle = rng.uniform(0.35, 0.65)
    shape = {
        "rising": at,
        "falling": 1 - at,
        "peaked": 1 - np.abs(at - middle) / 0.6,
        "dipping": np.abs(at - middle) / 0.6,
    }[trend]
    low, high = rng.uniform(0.05, 0.3), rng.uniform(0.65, 0.98)
    values = (
        low + (high - low) * shape ** rng.uniform(0.7, 1.6)
        if trend in TRENDS[:2]
        else (low + (high - low) * np.clip(shape, 0, 1))
    )
    values = np.clip(values + rng.normal(0, rng.uniform(0.03, 0.12), count), 0.03, 1)
    return {
        "kind": kind,
        "at": at,
        "values": values,
        "colour": ink,
        "count": count,
        "paper": "white" if rng.uniform() < 0.65 else "black",
        "edge": rng.uniform(0.06, 0.22, 4),
        "grid": "grid" if rng.uniform() < 0.5 else "frame",
        "second": str(rng.choice(VIVID)),
    }


def draw(plan: Plan, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one chart."""
    paper = shade(rng, plan["paper"], 15)
    axis = shade(rng, "gray", 40)
    ink = mix(shade(rng, plan["colour"], 40), axis, 0.1)
    canvas = Canvas(size, paper).whole()
    left, top, right, bottom = (
        plan["edge"][0],
        plan["edge"][1],
        1 - plan["edge"][2],
        1 - plan["edge"][3],
    )
    rules = np.linspace(top, bottom, int(rng.integers(3, 7))) if plan["grid"] == "grid" else ()
    for height in rules:
        canvas.line([(left, height), (right, height)], mix(paper, axis, 0.5), 0.008)
    x = left + 0.05 + (right - left - 0.1) * plan["at"]
    y = bottom - (bottom - top) * plan["values"]
    _marks(canvas, plan["kind"], x, y, bottom, ink, rng)
    axes = [(left, top), (left, bottom), (right, bottom)]
    if rng.uniform() < 0.3:
        axes += [(right, top), (left, top)]
    canvas.line(axes, axis, float(rng.uniform(0.01, 0.025)))
    for width in rng.uniform(0.1, 0.4, int(rng.integers(0, 3))):
        canvas.line([(left, top / 2), (left + width, top / 2)], axis, 0.03)
    return canvas.done(rng, 0.12)


def _marks(
    canvas: Canvas,
    kind: str,
    x: np.ndarray,
    y: np.ndarray,
    bottom: float,
    ink: tuple[int, int, int],
    rng: np.random.Generator,
) -> None:
    width = float(rng.uniform(0.014, 0.035))
    points = list(zip(x.tolist(), y.tolist()))
    if kind == "bar chart":
        half = (points[1][0] - points[0][0]) * float(rng.uniform(0.28, 0.46))
        for across, height in points:
            canvas.box(across - half, height, across + half, bottom, ink)
    elif kind == "line chart":
        canvas.line(points, ink, width)
    elif kind == "area chart":
        canvas.polygon([*points, (points[-1][0], bottom), (points[0][0], bottom)], ink)
    elif kind == "scatter plot":
        for across, height in points:
            canvas.disc(across, height, width, ink)
    else:
        for across, height in points:
            canvas.line([(across, bottom), (across, height)], ink, 0.012)
            canvas.disc(across, height, width, ink)


def datasets() -> list[BuiltinDataset]:
    """Return the charts."""
    names = tuple(f"{trend} {kind}" for kind, trend in PAIRS)
    return [BuiltinDataset("charts", "Charts", "charts", names, plan, draw, GRAMMAR)]
