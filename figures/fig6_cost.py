"""Figure 6: parameters, time and memory of MMA over the first adapted block."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["fig6_cost"]

if __name__ == "__main__":
    main(draw)
