"""Contact sheet of the built-in datasets: two rows of test images of each, base classes first."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from vlmlayers.data import builtin
from vlmlayers.data.builtin import BuiltinDataset

HERE = Path(__file__).resolve().parent
COLUMNS = 10
SIDE = 64


def draw(out: Path) -> list[Path]:
    """Draw the contact sheet into a folder."""
    names = builtin.names()
    figure = plt.figure(figsize=(9.6, 1.98 * len(names)), layout="none")
    for row, name in enumerate(names):
        _dataset(figure, builtin.get(name), row / len(names), 1 / len(names))
    path = out / "contact_sheet.png"
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=88)
    plt.close(figure)
    # 128 colours are a quarter of the bytes, and the sheet is part of the repository
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)
    return [path]


def _dataset(figure: Figure, data: BuiltinDataset, top: float, high: float) -> None:
    figure.text(
        0.01, 1 - top - 0.1 * high, f"{data.title}  ({data.name}, {len(data.class_names)} classes)",
        fontsize=9, fontweight="bold", va="center",
    )  # fmt: skip
    count = len(data.class_names)
    wide = 0.98 / COLUMNS
    for k in range(2 * COLUMNS):
        line, column = divmod(k, COLUMNS)
        left = 0.01 + column * wide
        low = 1 - top - high * (0.55 + 0.41 * line)
        axes = figure.add_axes((left, low, 0.94 * wide, 0.35 * high))
        axes.imshow(data.image("test", k, SIDE), interpolation="nearest")
        axes.set_axis_off()
        if k < count:
            axes.set_title(data.class_names[k], fontsize=5, pad=1.5)


def main() -> None:
    """Read the output folder from the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    matplotlib.use("agg")
    print(*draw(parser.parse_args().out), sep="\n")


if __name__ == "__main__":
    main()
