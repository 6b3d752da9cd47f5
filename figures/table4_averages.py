"""Table 4: averages of all methods the paper compares, your runs beneath them."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["table4_averages"]

if __name__ == "__main__":
    main(draw)
