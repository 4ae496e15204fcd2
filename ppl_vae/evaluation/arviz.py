"""ArviZ: a program's draws, weights and data in the groups that ArviZ's functions read and its files hold.

The only module that knows ArviZ. ArviZ below 1.0 keeps groups in an `InferenceData`, from 1.0 on in an
`xarray.DataTree`; both save themselves by `to_netcdf(path)`, and `arviz.from_netcdf(path)` opens the file without this
library.
"""

import datetime
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pyro
import torch
import xarray
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.batches import as_batch
from ppl_vae.evaluation.pareto import pareto_k
from ppl_vae.programs.param_store import scope
from ppl_vae.programs.traces import Structure, check_batch, log_density, structure, trace_pair

_DATA = 100  # data at a time
_DRAWS = 100  # draws at a time
_NUMBERS = 2**28  # numbers in the predictions, at the most
_DRAWN = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "prior_predictive")
_OBS = dict.fromkeys(_DRAWN[:4], 2) | {"observed_data": 0}  # which axis of a group is that of the data
Array = np.ndarray[Any, Any]
Groups = dict[str, dict[str, Array]]


@torch.no_grad()
def to_datatree(
    program: Any, x: Any, *, draws: int = 200, seed: int = 0, labels: Any = None, ids: Sequence[Any] | None = None
) -> Any:
    r"""Give a program's posterior draws, predictions, weights and data as ArviZ's groups.

    | group | variables | dimensions |
    |---|---|---|
    | `posterior` | each latent site, by q(z\|x) | chain, draw, obs, ... |
    | `posterior_predictive` | each observed site, drawn anew | chain, draw, obs, ... |
    | `log_likelihood` | each observed site, nats, summed over its entries | chain, draw, obs |
    | `sample_stats` | `log_weight`, nats | chain, draw, obs |
    | | `elbo`, nats, and `pareto_k` of those weights | obs |
    | `prior`, `prior_predictive` | the same by p(z) p(x\|z), with the first datum's covariates | chain, draw, ... |
    | `observed_data` | each observed site; NaN where masked | obs, ... |
    | `constant_data` | `labels`, and what else the batch holds | obs |

    There is one chain, of independent draws: R-hat is not defined for them, so that `arviz.summary` needs
    `kind="stats"`; without it, it warns and gives NaN. Nor is `arviz.loo` a comparison of models
    here, since each datum has latent variables of its own: use `log_evidence` and its Pareto k.

    Args:
        program: any program.
        x: data, a tensor (n, *x) or a batch dict.
        draws: a datum.
        seed: of the draws; the global random state is left alone.
        labels: something to know each datum by, shape (n,).
        ids: the coordinates of `obs`; 0, 1, ... by default.

    Returns:
        An `arviz.InferenceData` before ArviZ 1.0, an `xarray.DataTree` since. Numbers are in single precision.

    Raises:
        ValueError: for data, labels or ids that do not fit, fewer than one draw, draws that would not fit in memory, or
            a site named like a dimension: `chain`, `draw`, `obs`, or `z_dim_0` beside a site `z`.
    """
    draws = check_int("draws", draws)
    batch = check_batch(program, as_batch(x))
    first = next(iter(batch.values()))
    n = len(first)
    for name, given in (("labels", labels), ("ids", ids)):
        if given is not None and len(given) != n:
            raise ValueError(f"Expected `{name}` to have an entry for each of the {n} data; got {len(given)}.")
    found = structure(program, batch, seed=seed)
    size = draws * sum(value.numel() for value in batch.values() if value.is_floating_point())
    if size > _NUMBERS:
        raise ValueError(
            f"Expected at most {_NUMBERS:,} numbers of predictions; got {draws} draws of {n} data, {size:,}. Take "
            "fewer draws or part of the data."
        )
    some = range(0, n, _DATA)
    parts = [
        _block(program, {key: value[i : i + _DATA] for key, value in batch.items()}, found, draws, (seed, i))
        for i in some
    ]
    groups: Groups = {
        group: {name: np.concatenate([part[group][name] for part in parts], axis) for name in parts[0][group]}
        for group, axis in _OBS.items()
        if group in parts[0]
    }
    weights = torch.from_numpy(groups["sample_stats"]["log_weight"][0])
    groups["sample_stats"] |= {"elbo": weights.mean(0).numpy(), "pareto_k": pareto_k(weights).numpy()}
    few = {key: value[:1] for key, value in batch.items()}
    with scope(program), fork_rng(seed, "prior", device=first.device):
        drawn = _predict(program.model, few, found, draws)
    for group, names in (("prior", found.latents), ("prior_predictive", _sites(drawn, found))):
        groups[group] = {name: _array(drawn.nodes[name])[:, :, 0] for name in names}
    constants = {key: value.cpu().numpy() for key, value in batch.items() if not value.is_floating_point()}
    constants |= {} if labels is None else {"labels": np.asarray(labels)}
    groups |= {"constant_data": constants} if constants else {}
    attributes = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "ppl_vae",
        "inference_library_version": version("ppl-vae"),
        "program": type(program).__name__,
        "seed": seed,
    }
    return _assemble(groups, np.arange(n) if ids is None else np.asarray(ids), attributes)


def _block(program: Any, batch: dict[str, Tensor], found: Structure, draws: int, key: tuple[int, int]) -> Groups:
    """Draw for a block of data; arrays (chain, draw, obs, ...), those of the data (obs, ...)."""
    n = len(next(iter(batch.values())))
    parts = []
    for block, done in enumerate(range(0, draws, _DRAWS)):
        k = min(_DRAWS, draws - done)
        with scope(program), fork_rng(key[0], "datatree", key[1], block, device=next(iter(batch.values())).device):
            model, guide = trace_pair(program, batch, k, found.nesting)
            again = _predict(poutine.replay(program.model, trace=guide), batch, found, k)
        sites = _sites(again, found)
        score = {name: log_density(model, k, n, [name]) for name in sites}
        weight = log_density(model, k, n) - log_density(guide, k, n)
        parts.append(
            {
                "posterior": {name: _array(model.nodes[name]) for name in found.latents},
                "posterior_predictive": {name: _array(again.nodes[name]) for name in sites},
                "log_likelihood": {name: _plain(value).unsqueeze(0).numpy() for name, value in score.items()},
                "sample_stats": {"log_weight": weight.cpu().unsqueeze(0).numpy()},
            }
        )
    joined: Groups = {
        group: {name: np.concatenate([part[group][name] for part in parts], 1) for name in parts[0][group]}
        for group in parts[0]
    }
    joined["observed_data"] = {name: _seen(model.nodes[name], batch.get("mask")) for name in sites}
    return joined


def _predict(model: Any, batch: dict[str, Tensor], found: Structure, draws: int) -> Any:
    """Trace a model with what it observes drawn anew."""
    particles = pyro.plate("particles", draws, dim=-1 - found.nesting)
    return poutine.trace(particles(poutine.uncondition(model))).get_trace(**batch)


def _sites(trace: Any, found: Structure) -> list[str]:
    """Name the observed sites that stand for data."""
    nodes = ((name, trace.nodes[name]) for name in found.observed)
    return [
        name for name, node in nodes if not isinstance(node["fn"], Unit) and not node["infer"].get("_deterministic")
    ]


def _plain(value: Tensor) -> Tensor:
    return value.detach().float().cpu() if value.is_floating_point() else value.detach().cpu()


def _array(node: Any) -> Array:
    """Turn a site's value (k, *plates, n, *event) into (1, k, n, *plates, *event), without plates of one."""
    value, event = _plain(node["value"]), node["fn"].event_dim
    plates = value.shape[1 : value.dim() - event - 1]
    value = value.movedim(value.dim() - event - 1, 1)
    kept = [size for size in plates if size > 1]
    return value.reshape(1, *value.shape[:2], *kept, *value.shape[value.dim() - event :]).numpy()


def _seen(node: Any, mask: Tensor | None) -> Array:
    """Turn an observed value (*plates, n, *event) into (n, *plates, *event), NaN where it is masked."""
    value = _plain(node["value"])
    value = value.movedim(value.dim() - node["fn"].event_dim - 1, 0)
    if mask is not None and mask.shape == value.shape:
        value = value.float().masked_fill(~mask.cpu(), float("nan"))
    return value.numpy()


def _assemble(groups: Groups, ids: Array, attributes: dict[str, Any]) -> Any:
    """Name the dimensions, and let the ArviZ at hand hold the groups."""
    sets = {}
    for group, arrays in groups.items():
        drawn = ["chain", "draw"] if group in _DRAWN else []
        variables = {}
        for name, array in arrays.items():
            lead = [] if group == "sample_stats" and name in ("elbo", "pareto_k") else list(drawn)
            lead += [] if group in ("prior", "prior_predictive") else ["obs"]
            rest = [f"{name}_dim_{i}" for i in range(array.ndim - len(lead))]
            variables[name] = ([*lead, *rest], array)
        taken = {dimension for dimensions, _ in variables.values() for dimension in dimensions}
        if clash := sorted(taken & variables.keys()):
            raise ValueError(
                f"Expected sites and data by other names than the dimensions of `{group}`, {', '.join(sorted(taken))}; "
                f"got '{clash[0]}'. Rename it in the program."
            )
        size = next(iter(arrays.values())).shape
        coords = {"chain": [0], "draw": np.arange(size[1])} if drawn else {}
        coords |= {} if group in ("prior", "prior_predictive") else {"obs": ids}
        sets[group] = xarray.Dataset(variables, coords, attributes)
    return _hold(sets)


def _hold(sets: dict[str, xarray.Dataset]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        if arviz.__version__.startswith("0."):  # in 1.x the name InferenceData stands for a DataTree
            container: Any = arviz.InferenceData
            return container(**sets)
    return xarray.DataTree.from_dict(sets)
