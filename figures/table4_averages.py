"""Table 4: averages of the methods the paper compares and of others, your runs beneath them."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["table4_averages"]

if __name__ == "__main__":
    main(draw)
