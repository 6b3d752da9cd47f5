"""The command line: each verb is one call of the library.

Heavy imports stand inside the verbs, so that `--help` and the table verbs start at once and
never import torch.
"""

from __future__ import annotations

from vlmlayers.cli.command import app, main

__all__ = ["app", "main"]
