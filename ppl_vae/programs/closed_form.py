r"""The exact posterior and evidence of any linear-Gaussian program, read off its traces.

Given the data, the log density of such a program's latent variables is a quadratic. Its gradient at one point and along
each axis determines it, and with it the posterior's mean and covariance and the evidence, whatever the wiring: several
latent sites, inner plates, masks. Whether it is a quadratic is then checked at further points: close by, around the
posterior out to its tails, over the range of the prior, and at draws of the program itself. A program that fails at any
of them is refused, as is one with a latent site that does not cover the real line.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.families.supports import describe_support, of_entries
from ppl_vae.programs.target import BLOCK, Role, Target

_PROBES = 4  # points near the first at which the quadratic is checked
_FAR = 9.0  # standard deviations to either side of the posterior's mean, up to which it is checked again
_WIDE = 5.0  # the same of the prior, whose points all data share
_DIRECTIONS = 3  # lines through the mean along which it is
_POINTS = 4096, 24  # on these lines: of a block together, and of each datum at least; of the prior a quarter
_WITHIN = 4.0  # standard deviations that hold all but 6e-5 of the mass, where misses count as error
_NEAR = 1e-3  # standard deviations, within which only rounding shows
_DRAWN = 8  # draws of the prior, or of the guide, at which it is checked too
_CLOSED = (
    "Expected a linear-Gaussian {}, for a closed form: Gaussian latent variables and a likelihood that is Gaussian "
    "around an affine function of them; got one "
)


@dataclass(frozen=True)
class Gaussian:
    """An unnormalised Gaussian of each datum, in double precision.

    Args:
        loc: shape (n, z).
        precision: shape (n, z, z).
        log_normaliser: log of the integral, in nats, shape (n,).
        error: of `log_normaliser`, (n,): the largest miss of the quadratic within four standard deviations of the mean;
            0 where it is no more than rounding.
    """

    loc: Tensor
    precision: Tensor
    log_normaliser: Tensor
    error: Tensor

    @property
    def covariance(self) -> Tensor:
        """Shape (n, z, z)."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.precision))


def exact_posterior(program: Any, x: Any = None) -> MultivariateNormal:
    """Posterior p(z|x) of a linear-Gaussian program in closed form.

    Args:
        program: any program, or a `Target`; several latent sites stand side by side in the model's order.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.

    Returns:
        A multivariate normal of batch shape (n,). A program that is a module is computed in double precision, one that
        holds no tensors in that of the data.

    Raises:
        ValueError: If the program is not linear-Gaussian, so that there is no closed form.
    """
    posterior = gaussians(program, x, role="model")
    return MultivariateNormal(posterior.loc, precision_matrix=posterior.precision)


def exact_log_evidence(program: Any, x: Any = None) -> Tensor:
    """Log evidence log p(x) in closed form, (n,) in nats, in double precision.

    It is known for linear-Gaussian programs, and for those whose latent sites are all enumerated. Arguments and errors
    are those of `exact_posterior`.
    """
    target = Target.of(program, x)
    if target.structure.enumerated and not target.structure.latents:
        twin = target.to_double()
        with torch.no_grad(), twin.running(0):
            return twin.log_density(twin.trace("model", 1, values={}), 1)[0]
    return gaussians(target, role="model").log_normaliser


def gaussians(program: Any, x: Any = None, *, role: Role) -> Gaussian:
    """Gaussian of each datum, read off the model (the posterior and the evidence) or the guide (normalised).

    A target keeps it until a parameter of its program changes.
    """
    target = Target.of(program, x)
    return target.cached(("closed form", role), lambda: _gaussians(target.to_double(), role))


def _gaussians(target: Target, role: Role) -> Gaussian:
    """Read the first datum, at which most programs without a closed form fail already, then the others in blocks."""
    ends = [0, *range(1, target.n, BLOCK), None]
    parts = [_read(target.rows(slice(*pair)), role) for pair in itertools.pairwise(ends)]
    return Gaussian(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Gaussian)))


def _read(target: Target, role: Role) -> Gaussian:
    probe = _Probe(target, role)
    n, size = probe.origin.shape
    generator = torch.Generator().manual_seed(0)
    probes = 2 * torch.randn(_PROBES, n, size, generator=generator, dtype=torch.float64).to(probe.device)
    axes = torch.eye(size, dtype=torch.float64, device=probe.device).unsqueeze(1).expand(size, n, size)
    value, gradient = probe(torch.cat([torch.zeros_like(probes[:1]), axes, probes]))
    slope = gradient[0]  # (n, z)
    hessian = (gradient[1 : size + 1] - slope).transpose(0, 1)
    precision = -(hessian + hessian.mT) / 2
    steep = gradient.abs().amax(0)  # (n, z)
    largest = value.abs().amax(0)
    bend = 1e-6 * largest.clamp_max(1e3)  # so far out, where a small one grows; around the mean it counts as error
    slack = 1e-4 * steep.amax(-1).clamp_min(1e-12), 1e-6 + bend + 1e5 * probe.rounding * largest
    read = value[0], slope, precision
    probe.hold(_missed(read, probes, value[size + 1 :], gradient[size + 1 :]), slack)
    factor, failed = torch.linalg.cholesky_ex(precision)
    if bool(failed.any()):
        raise ValueError(
            f"Expected a {role} whose precision of {', '.join(probe.latents)} is positive definite; that of datum "
            f"{int(failed.nonzero()[0])} of its block is not, to rounding: its covariance is nearly singular."
        )
    peak = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
    places = [_around(peak, factor, generator, _FAR), probe.drawn]
    if role == "model" and len(probe.drawn):  # a bend far off, where there may be another mode
        places.append(_around(probe.drawn.mean(0), torch.eye(size).to(factor).expand_as(factor), generator, _WIDE, 4))
    points = probe.rounded(torch.cat(places))
    value, gradient = probe(points)
    probe.hold(_missed(read, points[:1], value[:1], gradient[:1]), slack)
    error = _check_around(probe, points, value, gradient, precision, factor, steep)
    slope = gradient[0]  # what rounding left of it, from afar
    shift = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
    log_det = 2 * (factor.diagonal(dim1=-2, dim2=-1) / probe.unit).log().sum(-1)
    top = value[0] + 0.5 * (slope * shift).sum(-1)
    return Gaussian(
        probe.origin + probe.unit * (points[0] + shift),
        precision / (probe.unit.unsqueeze(-1) * probe.unit.unsqueeze(-2)),
        top + 0.5 * size * math.log(2 * math.pi) - 0.5 * log_det,
        error,
    )


def _missed(
    read: tuple[Tensor, Tensor, Tensor], steps: Tensor, value: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Largest errors (n,) of a quadratic in gradient and value, at steps (k, n, z) from where it was read."""
    height, slope, precision = read
    bend = (precision @ steps.unsqueeze(-1)).squeeze(-1)
    predicted = height + (steps * (slope - 0.5 * bend)).sum(-1)
    return (gradient - slope + bend).abs().amax((0, 2)), (value - predicted).abs().amax(0)


def _around(loc: Tensor, factor: Tensor, generator: torch.Generator, reach: float, part: int = 1) -> Tensor:
    """Points (k, n, z) along random lines, evenly spread but for chance; a whole set after the mean and two next to it.

    The lines are orthogonal where the posterior is white, and their unit is of length sqrt(z), so that it is one
    standard deviation long as seen along any axis. Each datum has points of its own, so that together they leave no
    wide gaps: a narrow fold is seen if it is wider than these.
    """
    n, size = loc.shape
    raw = torch.randn(n, size, min(size, _DIRECTIONS), generator=generator, dtype=torch.float64)
    white = size**0.5 * torch.linalg.qr(raw).Q.to(loc.device)
    lines = white.shape[-1]
    each = max(_POINTS[0] // n, _POINTS[1]) // part // lines
    steps = torch.arange(each) + torch.rand(n, lines, each, generator=generator, dtype=torch.float64)
    lengths = (reach * (2 * steps / each - 1)).to(loc.device)  # (n, lines, k)
    rings = (white.unsqueeze(-1) * lengths.unsqueeze(1)).flatten(2)  # (n, z, k)
    near = _NEAR * white[..., :1] * torch.tensor([1.0, -1.0]).to(white)
    white = torch.cat([torch.zeros_like(near[..., :1]), near, rings], -1) if part == 1 else rings
    return loc + torch.linalg.solve_triangular(factor.mT, white, upper=True).permute(2, 0, 1)


def _check_around(
    probe: "_Probe",
    points: Tensor,
    value: Tensor,
    gradient: Tensor,
    precision: Tensor,
    factor: Tensor,
    steep: Tensor,
) -> Tensor:
    """Hold value and gradient at points (k, n, z), the first at the mean, against a quadratic, in units of its width.

    What rounding may do is taken from the two points next to the mean, and from what it does to the precision: each of
    its entries is a difference of two gradients, as large as `steep`, over a step of 1.
    """
    steps = (points - points[0]).permute(1, 2, 0)  # (n, z, k)
    white = factor.mT @ steps
    length = white.norm(dim=1).T  # (k, n), standard deviations
    slopes = torch.linalg.solve_triangular(factor, gradient.permute(1, 2, 0), upper=False)
    bent = (slopes - slopes[..., :1] + white).norm(dim=1).T  # (k, n)
    missed = (value - value[0] - (slopes[..., :1] * white).sum(1).T + 0.5 * length**2).abs()
    noise = bent[1:3].amax(0)
    widths = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    inflation = (torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1) / widths**2).sum(-1)
    entry = 10 * probe.rounding * (steep * widths).amax(-1) + 100 * noise
    relative = (1e-6 + entry * widths.amax(-1) * inflation).clamp_max(0.1)
    slack = relative * length + (100 * noise).clamp_max(0.1) + 1e-6
    doubt = slack * length + 1e-6 + 100 * probe.rounding * (value.abs() + value[0].abs())
    slack[0] = 0.1  # the mean itself is to be where it was said to be
    bent[0] = slopes[..., 0].norm(dim=1)
    probe.hold((bent, missed), (slack, doubt))
    inside = length <= _WITHIN * points.shape[-1] ** 0.5
    rounded = 1e-11 + 100 * probe.rounding * (value.abs() + value[0].abs())
    return torch.where(inside & (missed > rounded), missed, 0.0).amax(0)


class _Probe:
    """The log density of a model or guide, with its gradient, at vectors u of its latent sites.

    z = origin + unit * u: the origin is a draw of the guide; the unit, so that rounding stays small whatever the scale
    of z, is the spread of draws of the model (of its prior) or the guide itself.

    Raises:
        ValueError: If the support of a site is not the whole real line.
    """

    def __init__(self, target: Target, role: Role) -> None:
        self.target, self.role = target, role
        self.latents, self.device = target.structure.latents, target.device
        if names := target.structure.enumerated:  # of whose values one that is far off would leave no trace
            raise ValueError(f"{_CLOSED.format(role)}whose site '{names[0]}' is enumerated.")
        with torch.no_grad():
            model, guide = target.traces(1, 0)
        own: Any = (guide if role == "guide" else model).nodes
        if role == "guide" and any(own[name]["infer"].get("is_auxiliary") for name in guide.stochastic_nodes):
            raise ValueError(f"{_CLOSED.format(role)}with auxiliary sites.")
        for name in self.latents:
            if _mixed(own[name]["fn"]):  # of which a component that is far off would leave no trace
                raise ValueError(f"{_CLOSED.format(role)}whose site '{name}' is a mixture.")
            if (support := _short_of_real(own[name]["fn"])) is not None:
                raise ValueError(f"{_CLOSED.format(role)}whose site '{name}' is on {support}.")
        sites: Any = guide.nodes
        self.dtypes = {name: sites[name]["value"].dtype for name in self.latents}
        self.rounding = max(torch.finfo(dtype).eps for dtype in self.dtypes.values())
        self.origin = target.flatten(guide)[0]  # (n, z)
        drawn = self._draw()
        spread = drawn.std(0) if len(drawn) else torch.ones_like(self.origin)
        self.unit = torch.where((spread > 0) & spread.isfinite(), spread, 1.0)  # (n, z)
        self.drawn = (drawn - self.origin) / self.unit  # (k, n, z)

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (k, n), in nats, and its gradient (k, n, z) at vectors u (k, n, z)."""
        u = u.detach().requires_grad_()
        with torch.enable_grad(), self.target.running(0), self._defined():
            value = self.target.score_sites(self.role, self._given(u))
            gradient = torch.autograd.grad(value.sum(), u)[0] if value.requires_grad else torch.zeros_like(u)
        return value.detach(), gradient

    def rounded(self, u: Tensor) -> Tensor:
        """The vectors u as the sites will hold them, in their own precision."""
        return (self.target.layout.pack(self._given(u)).double() - self.origin) / self.unit

    def hold(self, missed: tuple[Tensor, Tensor], slack: tuple[Tensor, Tensor]) -> None:
        """Refuse the program where gradient or value are missed by more than their slack, or by no number."""
        if all(bool((by <= most).all()) for by, most in zip(missed, slack, strict=True)):
            return
        raise ValueError(f"{_CLOSED.format(self.role)}whose log density of {', '.join(self.latents)} is not quadratic.")

    @contextmanager
    def _defined(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # of a distribution's own checks
            raise ValueError(
                f"{_CLOSED.format(self.role)}that is not defined for all real values of {', '.join(self.latents)}."
            ) from error

    def _given(self, u: Tensor) -> dict[str, Tensor]:
        values = self.target.layout.unpack(self.origin + self.unit * u)
        return {name: value.to(self.dtypes[name]) for name, value in values.items()}

    def _draw(self) -> Tensor:
        """Draw z, (k, n, z); none from what cannot be drawn from."""
        with torch.no_grad(), self.target.running(0, "exact"), self._defined():
            try:
                return self.target.flatten(self.target.trace(self.role, _DRAWN))
            except NotImplementedError:
                return self.origin[None][:0]


def _mixed(distribution: Any) -> bool:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    weights = getattr(distribution, "mixture_distribution", getattr(distribution, "categorical", None))
    return weights is not None and bool(weights.logits.shape[-1] > 1)


def _short_of_real(distribution: Any) -> str | None:
    """Name the support of a distribution that has not the whole real line; one that does not know it is passed."""
    try:
        support = distribution.support
    except NotImplementedError:
        return None
    return None if isinstance(of_entries(support), type(constraints.real)) else describe_support(support)
