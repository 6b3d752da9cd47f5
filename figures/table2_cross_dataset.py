"""Table 2: cross-dataset transfer from ImageNet, your runs beneath it."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["table2_cross_dataset"]

if __name__ == "__main__":
    main(draw)
