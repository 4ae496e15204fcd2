r"""`Elbo`: Pyro's bounds, with a weight beta of their KL terms and with free bits."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.traceenum_elbo import TraceEnum_ELBO, _compute_dice_elbo
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent, kl_divergence
from torch.overrides import TorchFunctionMode

from ppl_vae.programs.traces import Batch, batch_of, drawn_sites, plain_sites

Per = Literal["latent", "site"]


class Terms(NamedTuple):
    """What an objective makes of a batch, sums over its data in nats, with a minus sign.

    Args:
        loss: minus the objective, a number or a tensor without gradient.
        surrogate: a tensor whose gradient is that of the loss, whatever its value.
        bound: minus the ELBO, like the loss.
    """

    loss: Any
    surrogate: Tensor
    bound: Any


class Beta:
    r"""Weight of the KL terms: a number, or one that a warm-up leads to.

    At step t, counted from 0, of a warm-up of T steps it is :math:`\beta (t + 1) / T`. Of several cycles each takes its
    share of the steps, and rises over the first half of them (Cyclical Annealing Schedule, Fu et al. 2019).

    Args:
        final: the weight after the warm-up.
        steps: of the warm-up; 0 for none.
        cycles: how often the weight rises from 0.
        device: of the tensor that holds the weight, since a captured step would keep a number as it was.
    """

    def __init__(self, final: float, steps: int = 0, cycles: int = 1, device: Any = None) -> None:
        self.final, self.steps, self.cycles = final, steps, cycles
        self.value = torch.tensor(final, dtype=torch.float64, device=device)

    def at(self, step: int) -> float:
        """The weight at a step."""
        if step >= self.steps:
            return self.final
        length = self.steps / self.cycles
        rise = length if self.cycles == 1 else length / 2
        return self.final * min((step % length + 1) / rise, 1.0)

    def set(self, step: int | None = None) -> None:
        """Take the weight of a step, the final one without."""
        if self.steps:
            self.value.fill_(self.final if step is None else self.at(step))


class Elbo:
    r"""One of Pyro's bounds, :math:`E \log p(x \mid z) - \beta \sum_g \max(\lambda, \overline{\mathrm{KL}}_g)`.

    Pyro's own estimator runs on traces whose latent sites are scaled by beta in model and guide, as by
    `poutine.scale`; observed sites and factors never are. The ELBO is that of the same traces without the scale.
    `TraceEnum_ELBO` takes neither beta nor free bits.

    Args:
        elbo: one of Pyro's; for beta and free bits with `_differentiable_loss_particle`.
        beta: weight of the KL terms; None for 1.
        free_bits: nats that a group may use at no cost, :math:`\lambda`; 0 is off.
        per: what a group is: each `latent`, or a `site` with all of its latents.

    References:
        beta-VAE (Higgins et al. 2017), equation 4; Improved Variational Inference with Inverse Autoregressive Flow
        (Kingma et al. 2016), equation 14.
    """

    def __init__(self, elbo: Any, beta: Beta | None = None, free_bits: float = 0.0, per: Per = "latent") -> None:
        self.elbo, self.beta, self.free_bits, self.per = elbo, beta, free_bits, per

    def __call__(self, program: Any, batch: Batch) -> Terms:
        """The bound of a batch."""
        sums: Any = (0.0, 0.0, 0.0)
        particles = self.elbo.num_particles
        stock = self.beta is None and not self.free_bits
        pairs = self.elbo._get_traces(program.model, guide_of(program), (), batch)
        if isinstance(self.elbo, TraceEnum_ELBO):
            whole = sum(map(_summed_out, pairs)) / -particles
            return Terms(torch_item(whole), whole, torch_item(whole))
        for traces in pairs:
            with torch.set_grad_enabled(stock and torch.is_grad_enabled()):
                plain = self.elbo._differentiable_loss_particle(*traces)
            parts = plain if stock else self._changed(traces)
            sums = [one + more / particles for one, more in zip(sums, (*parts, plain[0]), strict=True)]
        return Terms(*sums)

    def check(self, program: Any, batch: Batch) -> None:
        """Try the KL terms for free bits.

        Raises:
            ValueError: As `kl_means`.
        """
        guide = poutine.trace(program.guide).get_trace(**batch_of(program.guide, batch))
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**batch)
        kl_means(model, guide, 0, 1, self.per)

    def _changed(self, traces: tuple[Trace, Trace]) -> tuple[Any, Tensor]:
        """Minus the bound with beta and free bits, a sum over the particles of one pair of traces."""
        free: Any = 0.0
        if self.free_bits:
            vectorized = self.elbo.num_particles if self.elbo.vectorize_particles else 1
            for means, n in kl_means(*traces, self.elbo.max_plate_nesting, vectorized, self.per):
                free = free + n * vectorized * (self.free_bits - means).relu().sum()
        if self.beta is not None:
            free = self.beta.value * free
            for trace in traces:
                for name in drawn_sites(trace):
                    _scale(trace.nodes[name], self.beta.value)
        loss, surrogate = self.elbo._differentiable_loss_particle(*traces)
        return (loss + torch_item(free), surrogate + free) if self.free_bits else (loss, surrogate)


def _summed_out(traces: tuple[Trace, Trace]) -> Any:
    """The ELBO of one pair of traces, with the sums over enumerated sites, as `TraceEnum_ELBO` has it."""
    with _ZerosStay():
        return _compute_dice_elbo(*traces)


class _ZerosStay(TorchFunctionMode):
    """Sums costs weighted by probabilities in one shape: where a probability is 0, which Pyro leaves out, a 0 stands.

    So the operations are the same whatever the probabilities are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.all:  # whether there is nothing to leave out
            return False
        return args[0].where(args[1], 0) if func is Tensor.masked_select else func(*args, **(kwargs or {}))


def guide_of(program: Any) -> Callable[..., Any]:
    """The guide of a program, which takes what it needs of a batch."""
    return lambda **batch: program.guide(**batch_of(program.guide, batch))


def _scale(site: Any, scale: Tensor) -> None:
    """Scale the log probability of a site, as if it had been drawn under `poutine.scale`."""
    site["scale"] = site["scale"] * scale
    for key in ("log_prob", "log_prob_sum"):
        site[key] = site[key] * scale
    if "score_parts" in site:
        site["score_parts"] = site["score_parts"].scale_and_mask(scale)


def kl_means(model: Trace, guide: Trace, nesting: int, particles: int, per: Per) -> list[tuple[Tensor, int]]:
    """Mean KL terms over data and particles, one entry per group, for each site, and the number of its data.

    Args:
        model: trace of the model.
        guide: trace of the guide that it replays.
        nesting: how many plates enclose a site at the most, that of the particles included.
        particles: how many there are at the leftmost of these dims; 1 for no such dim.
        per: what a group is.

    Raises:
        ValueError: If a KL term has no closed form, or, for groups of single latents, does not factorise.
    """
    found = []
    for name in plain_sites(model, model.stochastic_nodes):
        site: Any = guide.nodes[name]
        other: Any = model.nodes[name]
        q, p, shape, inner = site["fn"], other["fn"], site["fn"].batch_shape, 0
        if per == "latent":
            shape, inner = shape + q.event_shape, len(q.event_shape)
            q, p = _entries(q), _entries(p)
        if q.event_shape != p.event_shape or (per == "latent" and q.event_shape):
            raise ValueError(
                f"Expected a KL term that factorises over the latents of site '{name}' for free bits; got "
                f'{type(q).__name__} and {type(p).__name__}. Use free_bits_per = "site", or Normal and StandardNormal.'
            )
        try:
            kl = kl_divergence(q, p).expand(shape)
        except NotImplementedError:
            raise ValueError(
                f"Expected a KL term in closed form at site '{name}' for free bits; got {type(q).__name__} and "
                f"{type(p).__name__}. Use families such as Normal and StandardNormal, or free_bits = 0."
            ) from None
        mask = site["mask"]
        kl = scale_and_mask(kl, 1.0, mask.reshape(*mask.shape, *[1] * inner) if isinstance(mask, Tensor) else mask)
        means = kl.mean([-1 - inner, *([-nesting - inner] if particles > 1 else [])])
        found.append((means if per == "latent" else means.sum(), kl.shape[-1 - inner]))
    return found


def _entries(distribution: Any) -> Any:
    """The distribution of each entry of an event."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution
