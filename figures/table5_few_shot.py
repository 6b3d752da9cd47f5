"""Table 5: all classes from a few items each; published numbers, your runs beneath them."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["table5_few_shot"]

if __name__ == "__main__":
    main(draw)
