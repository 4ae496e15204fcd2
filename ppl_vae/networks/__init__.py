"""Networks: from a context to an unconstrained parameter tensor."""

import lazy_loader

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in _names if name not in ("Encoding", "Network", "join")]  # what a spec can name
