"""From the score table to the layers to adapt, and to a predicted quality of any placement."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
