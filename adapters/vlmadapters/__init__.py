"""Methods that adapt a frozen CLIP: attach, train and evaluate them at any placement.

Importing this package does not import torch, so that the command line starts without it.
"""

import lazy_loader

_named, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Return a public name, or the version, as both packages are of one distribution."""
    if name == "__version__":
        import vlmlayers

        return vlmlayers.__version__
    return _named(name)
