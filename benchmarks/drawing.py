"""Images per second of each built-in dataset, drawn at 64 pixels on one core.

python benchmarks/drawing.py [--images N]
"""

from __future__ import annotations

import argparse
import time

from common import machine, write_table

from vlmlayers.data import builtin

SIZE = 64


def main(images: int) -> None:
    """Draw `images` items of each dataset, in processor time, after a few to warm up."""
    rows = []
    for name in builtin.names():
        data = builtin.get(name)
        for index in range(20):
            data.image("train", index, SIZE)
        start = time.process_time()
        for index in range(images):
            data.image("train", 20 + index, SIZE)
        spent = time.process_time() - start
        rows.append({"dataset": name, "pixels": SIZE, "images": images,
                     "images_per_second": round(images / spent, 1), **machine()})  # fmt: skip
    write_table("drawing", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    main(parser.parse_args().images)
