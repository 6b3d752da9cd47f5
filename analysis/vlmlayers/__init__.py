"""Which layers of a vision-language model should be adapted?

Measure every layer of both towers, choose layers from the measurements, test the choice by
training. Importing this package does not import torch.
"""

import lazy_loader

_named, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Return a public name, or the version of the installed package."""
    if name == "__version__":
        from importlib.metadata import version  # which takes longer than all else here

        return version("vlm-layers")
    return _named(name)
