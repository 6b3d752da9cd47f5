"""Extract a tiny model into a folder; run by the store tests as a process of its own.

    python extract_process.py STORE [COUNT] [DIE_AT] [SLOW]

DIE_AT is the number of images after which process 1 (or the only one) kills itself; SLOW is the
time each image takes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import tiny
import torch

torch.set_num_threads(1)

from vlmlayers.models import extract  # noqa: E402
from vlmlayers.models.processes import Processes  # noqa: E402


class Mortal(tiny.DrawnManifest):
    def open_image(self, item, root=None, size=None):
        time.sleep(SLOW)
        if DIE_AT and len(self.opened) >= DIE_AT and Processes.current().rank in MORTALS:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open_image(item, root, size)


COUNT, DIE_AT = (int(value) for value in [*sys.argv[2:4], "43", "0"][:2])
SLOW = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
MORTALS = (1,) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else (0,)
extract(
    tiny.model(),
    Mortal(count=COUNT),
    "train",
    out=Path(sys.argv[1]),
    batch_size=4,
    text="captions",
    progress=False,
)
