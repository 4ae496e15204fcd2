"""NUTS over the latent variables of each datum, as one vector."""

import warnings
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from ppl_vae.infer.hmc import Path, unvalidated
from ppl_vae.programs.joint import Joint


class _Potential(torch.autograd.Function):
    """Minus the log joint of all chains and data, with the gradient that the path has computed."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, path: Path) -> Tensor:
        state = path.at(u)
        ctx.save_for_backward(state.base_slope + state.tilt_slope)
        return -(state.base + state.tilt).sum()

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None]:
        return -given[0] * ctx.saved_tensors[0], None


def sample(joint: Joint, *, draws: int, warmup: int, chains: int, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """Run Pyro's NUTS on all chains and data as one vector, whose blocks are independent under the target.

    Returns:
        Draws (draws * chains, n, z) of the latent variables; `r_hat` and `ess` of each datum, (n,), and `divergences`.
    """
    path = Path(joint)
    with unvalidated(joint, seed), warnings.catch_warnings():
        kernel = NUTS(potential_fn=lambda given: _Potential.apply(given["u"], path))
        sampler = MCMC(kernel, draws, warmup, initial_params={"u": joint.draw("guide", chains)}, disable_progbar=True)
        sampler.run()
        values = joint.latents(sampler.get_samples()["u"].flatten(0, 1))
        divergences = len(sampler.diagnostics()["divergences"]["chain 0"])
    return values, {**_mixing(values.unflatten(0, (draws, chains))), "divergences": divergences}


def _mixing(values: Tensor) -> dict[str, Tensor]:
    """The worst R-hat and bulk effective sample size of each datum, (n,), by arviz."""
    array = values.permute(2, 3, 1, 0).cpu().numpy()  # (n, z, chains, draws)
    with warnings.catch_warnings():  # of the import, and of chains that never move, whose R-hat is NaN
        warnings.simplefilter("ignore")
        import arviz

        r_hat = [np.max([arviz.rhat(one) for one in rows]) for rows in array]
        ess = [np.min([arviz.ess(one) for one in rows]) for rows in array]
    return {"r_hat": torch.tensor(r_hat).to(values), "ess": torch.tensor(ess).to(values)}
