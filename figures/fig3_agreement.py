"""Figure 3: agreement of every vision position with every text position."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["fig3_agreement"]

if __name__ == "__main__":
    main(draw)
