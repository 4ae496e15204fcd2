"""Guides by name: Pyro's autoguides, made for a model."""

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from pyro import poutine
from pyro.infer import autoguide
from torch import nn

_NEEDS = {  # more than a model, so that a name is not enough
    "AutoNormalizingFlow": "AutoNormalizingFlow(model, init_transform_fn)",
    "AutoGuideList": "guide = AutoGuideList(model); guide.append(...)",
    "AutoCallable": "AutoCallable(model, guide)",
}
_FAMILIES = dict.fromkeys(("AutoNormal", "AutoDiagonalNormal", "AutoNormalMessenger"), "Normal")
_FAMILIES |= {"AutoMultivariateNormal": "FullNormal", "AutoLowRankMultivariateNormal": "LowRankNormal"}


def guide_names() -> list[str]:
    """Pyro's autoguides that a name is enough for."""
    others = ("AutoGuide", "AutoContinuous", "AutoMessenger", *_NEEDS)
    names = [name for name in autoguide.__all__ if name.startswith("Auto") and name not in others]
    return [name for name in names if inspect.isclass(getattr(autoguide, name))]


def family_of(guide: Any) -> tuple[str | None, dict[str, Any]]:
    """Family of one of Pyro's autoguides over the real line: its name here and its keywords; None of other guides."""
    guide = guide.guide if isinstance(guide, Messenger) else guide
    if isinstance(guide, autoguide.AutoGuideList):
        kinds = {family_of(part)[0] for part in guide}
        return ("Normal" if kinds == {"Normal"} else None), {}
    keys = {"rank": guide.rank} if type(guide).__name__ == "AutoLowRankMultivariateNormal" else {}
    return _FAMILIES.get(type(guide).__name__), keys


def normal_of(guide: Any) -> Any:
    """Normal of an autoguide on the real line: location and scale by site, or the distribution of all sites in a row.

    None for a guide whose normal cannot be read off.
    """
    if isinstance(guide, autoguide.AutoNormal):
        sites: Any = guide.prototype_trace
        names, parts = [name for name, _ in sites.iter_stochastic_nodes()], (guide.locs, guide.scales)
        return {name: [attrgetter(name)(part).detach() for part in parts] for name in names}
    known = isinstance(guide, autoguide.AutoDiagonalNormal | autoguide.AutoMultivariateNormal)
    return guide.get_posterior() if known else None


def make_guide(guide: Any, model: Callable[..., Any]) -> Any:
    """Make Pyro's autoguide of a name, for the sites that the model does not enumerate, or take a guide as it is.

    Raises:
        ValueError: If there is no autoguide of that name, or it needs more than the model.
    """
    if not isinstance(guide, str):
        return Messenger(guide) if isinstance(guide, autoguide.AutoMessenger) else guide
    if guide in _NEEDS:
        raise ValueError(f"Expected a guide that needs only the model; {guide} needs more. Pass {_NEEDS[guide]}.")
    if guide not in guide_names():
        raise ValueError(f"Expected `guide` to be one of {', '.join(guide_names())}, or callable; got {guide!r}.")
    return make_guide(getattr(autoguide, guide)(poutine.block(model, hide_fn=_enumerated)), model)


def _enumerated(site: Any) -> bool:
    """Whether the model sums a site out, so that the guide has nothing to draw."""
    return site["type"] == "sample" and not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


class Messenger(nn.Module):
    """One of Pyro's guides that run the model, such as `AutoNormalMessenger`, without the data that it observes.

    Args:
        guide: the guide.
    """

    def __init__(self, guide: Any) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Draw the latent sites; what the model observes has no place in the guide's density."""
        with poutine.block(hide_fn=lambda site: site["type"] == "sample" and site["is_observed"]):
            self.guide(*args, **kwargs)
