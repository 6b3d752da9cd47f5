"""Which layers of a vision-language model should be adapted?

Measure every layer of both towers, choose layers from the measurements, test the choice by
training. Importing this package does not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
