"""Figure 2: distance between images and texts, and the modality gap, at every position."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["fig2_gap"]

if __name__ == "__main__":
    main(draw)
