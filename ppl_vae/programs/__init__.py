"""Programs: Pyro pairs of `model` and `guide`, and what can be read off their traces."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
