"""Variational autoencoders that one can trust: Pyro programs, their evidence, and the truth to compare them with."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Conditional": "conditional",
    "VAE": "program",
    "Program": "program",
    "PPCA": "ppca",
    "Spec": "spec",
    "load_spec": "spec",
    "load_run": "run",
    "fit": "svi",
    "log_weights": "evidence",
    "log_evidence": "evidence",
    "exact_posterior": "exact",
    "exact_log_evidence": "exact",
    "compare_posteriors": "compare",
    "reference_posterior": "reference",
    "inference_gap": "gap",
}

__all__ = [*_HOME, "data", "families", "networks"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that asking for help need not wait for torch."""
    if name in _HOME:
        return getattr(import_module(f"ppl_vae.{_HOME[name]}"), name)
    if name in ("data", "families", "networks"):
        return import_module(f"ppl_vae.{name}")
    raise AttributeError(f"module 'ppl_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
