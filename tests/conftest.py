"""What every test runs under: double precision, Pyro's validation on, a random state that is not shared."""

from collections.abc import Iterator

import pyro
import pytest
import torch
from browser import CHROMIUM, Page, browser


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Start from a known random state and an empty parameter store; default to double precision."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    """A page of a headless browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with browser() as one:
        yield one
