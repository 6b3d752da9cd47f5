"""Figure 5: quality predicted from the scores against trained accuracy."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["fig5_predicted_vs_trained"]

if __name__ == "__main__":
    main(draw)
