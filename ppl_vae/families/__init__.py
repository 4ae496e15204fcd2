"""Families of distributions, and the conditionals that a family and a network make."""

import lazy_loader

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
_OTHERS = ("Conditional", "Elementwise", "Family", "LinearGaussian", "same_support")
__all__ = [name for name in _names if name not in _OTHERS]  # what a spec can name
