"""Linear-Gaussian twins: a program of every wiring with random weights, its data, and the truth by numpy and scipy.

`TWINS` maps a name to a function that builds the twin, in double precision. The oracle shares nothing with the library:
it forms the joint mean and covariance of (z, x) and conditions by `np.linalg.solve`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from ppl_vae import VAE, Conditional, Given, Program
from ppl_vae.families import ExactNormal, FullNormal, Normal, StandardNormal
from ppl_vae.networks import Linear
from ppl_vae.programs.program import load_program

MODELS = Path(__file__).parents[1] / "models"
FLOOR = 1e-6

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Dense:
    """z ~ N(loc, covariance), x | z ~ N(weight z + bias, diag(noise)), as plain arrays; `noise` is a variance."""

    loc: Array
    covariance: Array
    weight: Array
    bias: Array
    noise: Array

    def truth(self, x: Array, seen: npt.NDArray[np.bool_] | None = None) -> tuple[Array, Array, Array]:
        """Give log p(x) (n,), the posterior's means (n, z) and covariances (n, z, z), each datum by itself."""
        mean = self.weight @ self.loc + self.bias
        total = self.weight @ self.covariance @ self.weight.T + np.diag(self.noise)
        cross = self.covariance @ self.weight.T
        seen = np.ones(x.shape, bool) if seen is None else seen
        evidence, locs, covariances = [], [], []
        for row, here in zip(x, seen, strict=True):
            apart, block, part = row[here] - mean[here], total[np.ix_(here, here)], cross[:, here]
            evidence.append(multivariate_normal(mean[here], block).logpdf(row[here]) if here.any() else 0.0)
            gain = np.linalg.solve(block, part.T).T
            locs.append(self.loc + gain @ apart)
            covariances.append(self.covariance - gain @ part.T)
        return np.array(evidence), np.array(locs), np.array(covariances)


@dataclass(frozen=True)
class Twin:
    """A program with an exact guide, its data, and the truth: log p(x) (n,), loc (n, z) and covariance (n, z, z)."""

    program: Any
    batch: dict[str, Tensor]
    log_evidence: Array
    loc: Array
    covariance: Array


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def positive(raw: Tensor) -> Array:
    """Softplus as numpy has it, with the families' floor."""
    return np.logaddexp(0.0, array(raw)) + FLOOR


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all parameters with draws of N(0, 0.7^2)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def draws(*shape: int, seed: int = 1) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def single(prior: Any, likelihood: Callable[[Tensor], Any], proposal: Any) -> Program:
    """The pair of one latent number and one observed number."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior)
            pyro.sample("x", likelihood(z), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", proposal)

    return Program(model, guide)


def linear_vae(prior: Any, likelihood: Any, *, seed: int = 0) -> VAE:
    """Give a VAE of a Gaussian prior and a linear-Gaussian likelihood with the exact guide, with random weights."""
    prior, likelihood = Conditional(prior), Conditional(likelihood, Linear(), context=tuple(prior.event_shape))
    vae = VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood))).double()
    randomise(vae, seed)
    return vae


def dense(vae: Any) -> Dense:
    """Read the parameters of a linear VAE into arrays."""
    family, network, prior = vae.likelihood.family, vae.likelihood.network, vae.prior
    z, raw = prior.family.event_shape[0], array(prior.network.value)
    loc, covariance = np.zeros(z), np.eye(z)
    if isinstance(prior.family, FullNormal):
        tril = np.zeros((z, z))
        tril[np.tril_indices(z)] = raw[z:]
        np.fill_diagonal(tril, np.logaddexp(0.0, tril.diagonal()) + FLOOR)
        loc, covariance = raw[:z], tril @ tril.T
    elif isinstance(prior.family, Normal):
        scale = np.logaddexp(0.0, raw[z:]) + FLOOR if len(raw) > z else array(prior.family.own_scale())
        loc, covariance = raw[:z], np.diag(np.broadcast_to(scale, (z,)) ** 2)
    noise = positive(family.raw_scale) if isinstance(family.scale, str) else np.array(family.scale)
    weight = array(network.weight) / array(network.scale)
    return Dense(
        loc,
        covariance,
        weight,
        array(network.bias) - weight @ array(network.shift),
        np.broadcast_to(noise.reshape(-1), (weight.shape[0],)) ** 2,
    )


def _vae_twin(vae: VAE, batch: dict[str, Tensor]) -> Twin:
    x = array(batch["x"])
    seen = batch["mask"].flatten(1).numpy() if "mask" in batch else None
    return Twin(vae, batch, *dense(vae).truth(x.reshape(len(x), -1), seen))


def ppca_vae() -> Twin:
    return _vae_twin(linear_vae(StandardNormal(3), Normal(7, scale="shared")), {"x": draws(6, 7)})


def learnable_prior() -> Twin:
    return _vae_twin(linear_vae(Normal(3), Normal(7, scale="shared")), {"x": draws(6, 7)})


def full_prior() -> Twin:
    return _vae_twin(linear_vae(FullNormal(3), Normal(7, scale="feature")), {"x": draws(6, 7)})


def feature_scale() -> Twin:
    return _vae_twin(linear_vae(StandardNormal(4), Normal(5, scale="feature")), {"x": draws(6, 5)})


def fixed_scale() -> Twin:
    return _vae_twin(linear_vae(Normal(2, scale="feature"), Normal(5, scale=0.25)), {"x": draws(6, 5)})


def more_latents_than_features() -> Twin:
    return _vae_twin(linear_vae(FullNormal(6), Normal(3, scale="shared")), {"x": draws(6, 3)})


def one_by_one() -> Twin:
    return _vae_twin(linear_vae(Normal(1), Normal(1, scale="shared")), {"x": draws(6, 1)})


def masked() -> Twin:
    """Entries missing, NaN standing there; one datum complete, one without any entry."""
    x, mask = draws(6, 7), draws(6, 7, seed=2) > -0.5
    mask[0], mask[1] = True, False
    return _vae_twin(
        linear_vae(FullNormal(3), Normal(7, scale="feature")), {"x": x.masked_fill(~mask, float("nan")), "mask": mask}
    )


def picture() -> Twin:
    """Data that are matrices, with missing entries."""
    x, mask = draws(6, 2, 4), draws(6, 2, 4, seed=2) > -1
    return _vae_twin(linear_vae(Normal(3), Normal((2, 4), scale="feature")), {"x": x, "mask": mask})


def standardised_decoder() -> Twin:
    """A decoder that shifts and scales its input."""
    vae = linear_vae(Normal(3), Normal(7, scale="shared"))
    network: Any = vae.likelihood.network
    network.centre(torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor(1.7).double())
    return _vae_twin(vae, {"x": draws(6, 7)})


def plain_ppca() -> Twin:
    program: Any = randomise(load_program(str(MODELS / "ppca.py"))(7, 3, exact=True).double())
    noise = np.logaddexp(0.0, array(program.raw_scale)) ** 2
    oracle = Dense(np.zeros(3), np.eye(3), array(program.weight), array(program.loc), np.full(7, noise))
    x = draws(6, 7)
    return Twin(program, {"x": x}, *oracle.truth(array(x)))


def two_level() -> Twin:
    program: Any = randomise(load_program(str(MODELS / "two_level.py"))(7, 3, top=2, linear=True).double())
    f, g, (s, t) = array(program.f.weight), array(program.g.weight), np.logaddexp(0.0, array(program.raw_scales))
    covariance = np.block([[np.eye(2), f.T], [f, f @ f.T + s**2 * np.eye(3)]])
    weight = np.concatenate([np.zeros((7, 2)), g], 1)
    oracle = Dense(np.zeros(5), covariance, weight, array(program.g.bias), np.full(7, t**2))
    x = draws(6, 7)
    return Twin(program, {"x": x}, *oracle.truth(array(x)))


def state_space() -> Twin:
    steps = 6
    program: Any = randomise(load_program(str(MODELS / "state_space.py"))(steps, linear=True).double(), seed=3)
    (q, r), a = np.logaddexp(0.0, array(program.raw_scales)), array(program.dynamics).item()
    root = q * np.array([[a ** (t - u) if u <= t else 0.0 for u in range(steps)] for t in range(steps)])
    c, b = array(program.decoder.weight).item(), array(program.decoder.bias).item()
    oracle = Dense(np.zeros(steps), root @ root.T, c * np.eye(steps), np.full(steps, b), np.full(steps, r**2))
    x = draws(6, steps)
    return Twin(program, {"x": x}, *oracle.truth(array(x)))


def inner_plate() -> Twin:
    """A stranger's functions: a shared u, and several z a datum in a plate at dim -2, where x is observed as well."""
    generator = np.random.default_rng(4)
    a, b, c, m = generator.normal(size=(4, 3))
    s, r = generator.uniform(0.4, 1.5, size=(2, 3))

    def column(values: Array) -> Tensor:
        return torch.from_numpy(values).unsqueeze(-1)  # (3, 1), beside (..., 3, n)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(column(m), column(s)))
                u = u.unsqueeze(-2) if u.dim() == 1 else u
                pyro.sample("x", dist.Normal(column(a) * z + column(c) * u + column(b), column(r)), obs=x.T)

    def guide(x: Tensor) -> None:
        rest = x.T - column(a * m + b)  # (3, n), which is c u plus noise
        spread = column(a**2 * s**2 + r**2)
        precision = 1 + (column(c) ** 2 / spread).sum(0)
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal((column(c) * rest / spread).sum(0) / precision, precision**-0.5))
            with pyro.plate("parts", 3, dim=-2):
                u = u.unsqueeze(-2) if u.dim() == 1 else u
                inner = column(1 / s**2 + a**2 / r**2)
                moment = column(m / s**2) + column(a / r**2) * (x.T - column(c) * u - column(b))
                pyro.sample("z", dist.Normal(moment / inner, inner**-0.5))

    oracle = Dense(
        np.concatenate([[0.0], m]),
        np.diag(np.concatenate([[1.0], s**2])),
        np.concatenate([c[:, None], np.diag(a)], 1),
        b,
        r**2,
    )
    x = draws(6, 3)
    return Twin(Program(model, guide), {"x": x}, *oracle.truth(array(x)))


def masked_plate() -> Twin:
    """A stranger's functions: entries of x in a plate at dim -2, some of them hidden by a mask."""
    generator = np.random.default_rng(5)
    w, b, s = generator.normal(size=(4, 2)), generator.normal(size=4), generator.uniform(0.4, 1.5, size=4)
    weight, bias, scale = (torch.from_numpy(part) for part in (w, b.reshape(-1, 1), s.reshape(-1, 1)))

    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            with pyro.plate("entries", 4, dim=-2):
                mean = (z.unsqueeze(-2) if z.dim() == 2 else z) @ weight.T  # (..., 1, n, 4)
                mean = mean.transpose(-1, -3).squeeze(-1) if z.dim() > 2 else mean.squeeze(-2).T
                seen = torch.where(mask, x, 0.0).T
                pyro.sample("x", dist.Normal(mean + bias, scale).mask(mask.T), obs=seen)

    def guide(x: Tensor, mask: Tensor) -> None:
        each = mask.to(x) / scale.T**2  # (n, 4)
        precision = torch.eye(2) + torch.einsum("nx,xi,xj->nij", each, weight, weight)
        moment = (each * (torch.where(mask, x, 0.0) - bias.T)) @ weight
        loc = torch.linalg.solve(precision, moment.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    x, mask = draws(6, 4), draws(6, 4, seed=3) > -0.8
    mask[0], mask[1] = True, False
    oracle = Dense(np.zeros(2), np.eye(2), w, b, s**2)
    return Twin(Program(model, guide), {"x": x, "mask": mask}, *oracle.truth(array(x), mask.numpy()))


def given_classes() -> Twin:
    """A label of three classes, given to all parts: each class has a mean and a covariance of its own."""
    x, y, mask = draws(6, 5), torch.arange(6) % 3, draws(6, 5, seed=2) > -1.5
    vae = given_vae(3)
    parts = [class_oracle(vae, label).truth(array(x), mask.numpy()) for label in range(3)]
    own = [np.stack([parts[label][part][row] for row, label in enumerate(y.tolist())]) for part in range(3)]
    return Twin(vae, {"x": x, "y": y, "mask": mask}, *own)


def given_covariates() -> Twin:
    """A number and a code, given to the likelihood, which they shift."""
    prior, likelihood = Conditional(Normal(2)), Conditional(Normal(4, scale=0.5), Linear(), context=(2, 4))
    given = Given(covariates=[0, 3])
    vae = VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)), given).double()
    randomise(vae)
    known = torch.stack([10 * draws(6, seed=3) + 50, torch.arange(6).double() % 3], 1)
    given.fit({"covariates": known})
    number = array(known[:, 0])
    seen = np.concatenate([((number - number.mean()) / number.std())[:, None], np.eye(3)[known[:, 1].long()]], 1)
    x, weight, bias = draws(6, 4), array(vae.likelihood.network.weight), array(vae.likelihood.network.bias)
    raw = array(vae.prior.network.value)
    oracle = Dense(raw[:2], np.diag(positive(torch.tensor(raw[2:])) ** 2), weight[:, :2], bias, np.full(4, 0.25))
    return Twin(vae, {"x": x, "covariates": known}, *oracle.truth(array(x) - seen @ weight[:, 2:].T))


def given_vae(classes: int, size: int = 5, latent: int = 2) -> VAE:
    """Quadratic discriminant analysis as a VAE with the exact guide, with random weights."""
    prior = Conditional(FullNormal(latent), Linear(), context=classes)
    likelihood = Conditional(Normal(size, scale="feature"), Linear(), context=(latent, classes))
    given = Given(y=classes, to=["prior", "likelihood", "posterior"])
    vae = VAE(prior, likelihood, Conditional(ExactNormal(prior, likelihood)), given).double()
    randomise(vae)
    return vae


def class_oracle(vae: Any, label: int) -> Dense:
    """Read the model of one class of such a VAE into arrays."""
    z, network, raw = vae.prior.family.event_shape[0], vae.likelihood.network, vae.prior.network
    values = array(raw.weight)[:, label] + array(raw.bias)
    tril = np.zeros((z, z))
    tril[np.tril_indices(z)] = values[z:]
    np.fill_diagonal(tril, np.logaddexp(0.0, tril.diagonal()) + FLOOR)
    weight, noise = array(network.weight), positive(vae.likelihood.family.raw_scale) ** 2
    return Dense(values[:z], tril @ tril.T, weight[:, :z], array(network.bias) + weight[:, z + label], noise)


TWINS: dict[str, Callable[[], Twin]] = {
    builder.__name__: builder
    for builder in (
        ppca_vae,
        learnable_prior,
        full_prior,
        feature_scale,
        fixed_scale,
        more_latents_than_features,
        one_by_one,
        masked,
        masked_plate,
        picture,
        standardised_decoder,
        plain_ppca,
        two_level,
        state_space,
        inner_plate,
        given_classes,
        given_covariates,
    )
}


class _Perturb(Messenger):
    def __init__(self, factor: float, shift: float) -> None:
        super().__init__()
        self.factor, self.shift = factor, shift

    def _pyro_sample(self, message: Any) -> None:
        if message["is_observed"] or type(message["fn"]).__name__ == "_Subsample":
            return
        fn = message["fn"]
        if isinstance(fn, torch.distributions.MultivariateNormal):
            message["fn"] = dist.MultivariateNormal(fn.loc + self.shift, scale_tril=self.factor * fn.scale_tril)
        else:
            message["fn"] = dist.Normal(fn.mean + self.shift, self.factor * fn.stddev).to_event(fn.event_dim)


def perturbed(program: Any, factor: float, shift: float) -> Program:
    """Give the program with a wrong guide: each latent site's scale times `factor`, its mean plus `shift`."""

    def guide(**batch: Any) -> Any:
        with _Perturb(factor, shift):
            return program.guide(**batch)

    return Program(program.model, guide)
