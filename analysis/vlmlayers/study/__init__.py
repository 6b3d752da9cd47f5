"""A study: the whole way from a model and datasets to a report, stage by stage."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
