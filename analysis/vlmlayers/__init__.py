"""Which layers of a vision-language model should be adapted?

Measure every layer of both towers, choose layers from the measurements, prove the choice by
training. Importing this package does not import torch.
"""

from __future__ import annotations
