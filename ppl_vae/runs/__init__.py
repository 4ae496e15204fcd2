"""Runs: from a TOML file to a checked spec, and from a spec to a run directory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
