"""Figure 1: how well the dataset is recognised at every position of both towers."""

from __future__ import annotations

from _script import main

from vlmlayers.figures import DRAWINGS

draw = DRAWINGS["fig1_dataset_recognition"]

if __name__ == "__main__":
    main(draw)
