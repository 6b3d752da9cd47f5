"""What an extraction costs at any size, from measured constants, and whether that comes true.

    python benchmarks/scale.py [--images N] [MODEL [DATASET]]

Measures a batch, foretells N and 4 N images with a store and with sums, runs them, and writes both
beside each other (`scale_check.csv`), then the table for 1e4 to 1e9 images (`scale.csv`), which is
also put into docs/scale.md between its two marks.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, peak_mib, reset_peak, resident_mib, write_table

from vlmlayers import Manifest
from vlmlayers.models import extract, load_model, stream
from vlmlayers.models.estimate import Costs, measure_costs, scale_table

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MARKS = "<!-- recorded by benchmarks/scale.py -->", "<!-- end of the recorded table -->"


def run(kind: str, model: Any, manifest: Manifest, items: list[Any], costs: Costs) -> dict:
    """Run one extraction; return what was foretold and what it took."""
    streaming = kind == "sums"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        work = stream if streaming else extract
        before = resident_mib()
        reset_peak()
        start = time.perf_counter()
        work(model, manifest, "train", items=items, out=out, progress=False)
        seconds = time.perf_counter() - start
        size = sum(f.stat().st_size for f in out.rglob("*.np[yz]") if "text" not in f.parts)
    foretold = costs.seconds(len(items), streaming=streaming)
    expected = costs.stream_bytes if streaming else len(items) * costs.bytes_per_image
    return {
        "what": kind,
        "images": len(items),
        "seconds_foretold": round(foretold, 2),
        "seconds": round(seconds, 2),
        "ratio": round(seconds / foretold, 3),
        "megabytes_foretold": round(expected / 1e6, 2),
        "megabytes": round(size / 1e6, 2),
        "peak_growth_mib": round(peak_mib() - before, 1),
    }


def markdown(costs: Costs, where: dict[str, Any]) -> str:
    """Return the table of docs/scale.md."""
    table = scale_table(costs)
    lines = [
        f"Measured per image on {where['hardware']} ({where['threads']} threads): model "
        f"{1e3 * costs.forward:.1f} ms, decoding {1e3 * costs.decode:.1f} ms, writing "
        f"{1e3 * costs.write:.3f} ms, summing instead {1e3 * costs.add:.2f} ms.",
        "",
        "| images | processes | store, hours | sums, hours | limit | store, GB | sums, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        lines.append(
            f"| {row['images']:.0e} | {row['processes']} | {row['store_hours']:,.2f} | "
            f"{row['stream_hours']:,.2f} | {row['limited_by']} | {row['store_gb']:,.2f} | "
            f"{row['stream_mb']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="mini-clip")
    parser.add_argument("dataset", nargs="?", default="shapes_filled")
    parser.add_argument("--images", type=int, default=256)
    asked = parser.parse_args()
    model, manifest = load_model(asked.model), Manifest.load(asked.dataset)
    items = manifest.items("train")[: 4 * asked.images]
    costs = measure_costs(model, manifest, items, repeats=5)
    rows = [
        run(kind, model, manifest, items[:count], costs)
        for count in (asked.images, 4 * asked.images)
        for kind in ("store", "sums")
    ]
    where = {"model": asked.model, "dataset": asked.dataset, **machine(str(model.device))}
    write_table("scale_check", [row | where for row in rows])
    write_table("scale", [row | where for row in scale_table(costs).to_dict("records")])
    if PAGE.exists():
        first, last = MARKS
        block = f"{first}\n{markdown(costs, where)}\n{last}"
        text = PAGE.read_text(encoding="utf-8")
        pattern = f"{re.escape(first)}.*{re.escape(last)}"
        PAGE.write_text(re.sub(pattern, lambda _: block, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
