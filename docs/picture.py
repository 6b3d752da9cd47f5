"""Draw the pictures of the README from a run folder: `python docs/picture.py runs/demo`.

`answer.png` is the answer box of the run's report without its list of facts, as a browser shows it,
and needs Chromium; `layers.png` holds two of its figures.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image, ImageChops

import vlmlayers as vl

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT, SCALE, COLOURS = 1080, 1600, 1.5, 64
ALONE = (
    "<style>body > :not(main), main > :not(#answer), #answer button, #answer dl "
    "{ display: none !important }"
    "main { padding: 8px !important; margin: 0; max-width: none } #answer { margin: 0 }</style>"
)


def draw_layers(run: Path, file: Path) -> None:
    """Draw dataset accuracy and the modality gap along depth, chosen blocks shaded."""
    scores = vl.read_scores(run)
    choice = vl.LayerChoice.load(run / "choice.json")
    with vl.plots.style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        vl.plots.layer_curves(scores, "dataset_accuracy", choice=choice, ax=left)
        vl.plots.gap_curves(scores, "centroid_gap", choice=choice, ax=right)
        right.get_legend().remove()
        figure.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize=7)
        figure.savefig(file, dpi=150)


def show_answer(run: Path, file: Path) -> None:
    """Show the answer box of a report in a browser and keep what is seen."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"none of {', '.join(names)} is installed; {file.name} stays as it is")
    page = (run / "report.html").read_text(encoding="utf-8").replace("</head>", f"{ALONE}</head>")
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "answer.html"
        alone.write_text(page, encoding="utf-8")
        flags = [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}",
                 f"--screenshot={file}", f"--user-data-dir={folder}/profile"]  # fmt: skip
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags,
             alone.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


def shrink(file: Path) -> None:
    """Cut the empty margin below a picture and keep few colours."""
    picture = Image.open(file).convert("RGB")
    empty = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    found = ImageChops.difference(picture, empty).getbbox()
    assert found is not None, "there is something to see"
    bottom = min(picture.height, found[3] + found[1])
    picture.crop((0, 0, picture.width, bottom)).quantize(COLOURS).save(file, optimize=True)


if __name__ == "__main__":
    run = Path(sys.argv[1])
    for draw, name in ((draw_layers, "layers.png"), (show_answer, "answer.png")):
        draw(run, IMAGES / name)
        shrink(IMAGES / name)
