"""Table 3: domain generalization from ImageNet, your runs beneath it."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["table3_domain_generalization"]

if __name__ == "__main__":
    main(draw)
