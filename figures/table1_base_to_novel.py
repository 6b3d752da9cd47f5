"""Table 1: base-to-novel generalization on the eleven datasets, your runs beside it."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["table1_base_to_novel"]

if __name__ == "__main__":
    main(draw)
