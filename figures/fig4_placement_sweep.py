"""Figure 4: base, novel and harmonic mean of MMA over the first adapted block."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["fig4_placement_sweep"]

if __name__ == "__main__":
    main(draw)
