"""The report a person hands to a colleague: one HTML file that opens offline, and Markdown."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
