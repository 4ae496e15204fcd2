"""ArviZ: a program's draws, weights and data in the groups that ArviZ's functions read and its files hold.

The only module that knows ArviZ. ArviZ below 1.0 keeps groups in an `InferenceData`, from 1.0 on in an
`xarray.DataTree`; both save themselves by `to_netcdf(path)`, and `arviz.from_netcdf(path)` opens the file without this
library.
"""

import datetime
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.evaluation.pareto import pareto_k, pareto_smoothed
from ppl_vae.infer.reference import Reference
from ppl_vae.programs.target import BLOCK, Target
from ppl_vae.programs.traces import Given, unscaled

if TYPE_CHECKING:
    import xarray

_DRAWS = 100  # draws at a time
_NUMBERS = 2**28  # numbers in the predictions, at the most
_DIMENSIONS = {  # that the variables of a group begin with
    **dict.fromkeys(
        ("posterior", "reweighted", "posterior_predictive", "log_likelihood", "sample_stats"), ("chain", "draw", "obs")
    ),
    **dict.fromkeys(("prior", "prior_predictive"), ("chain", "draw")),
    **dict.fromkeys(("observed_data", "constant_data"), ("obs",)),
}
Array = np.ndarray[Any, Any]
Groups = dict[str, dict[str, Array]]


@torch.no_grad()
def to_datatree(
    program: Any,
    x: Any = None,
    *,
    draws: int = 200,
    seed: int = 0,
    labels: Any = None,
    ids: Any = None,
    reference: Reference | None = None,
) -> Any:
    r"""A program's posterior draws, predictions, weights and data as ArviZ's groups.

    | group | variables | dimensions |
    |---|---|---|
    | `posterior` | each latent site, by q(z\|x); enumerated ones by p(y\|z, x) | chain, draw, obs, ... |
    | `reweighted` | the same draws, resampled by their smoothed importance weights | chain, draw, obs, ... |
    | `posterior_predictive` | each observed site, drawn anew | chain, draw, obs, ... |
    | `log_likelihood` | each observed site, nats, summed over its entries | chain, draw, obs |
    | `sample_stats` | `log_weight`, nats | chain, draw, obs |
    | | `resampled`, the draws that make up `reweighted` | chain, draw, obs |
    | | `elbo`, nats, and `pareto_k` of those weights | obs |
    | `prior`, `prior_predictive` | the same by p(z) p(x\|z), with the first datum's covariates | chain, draw, ... |
    | `observed_data` | each observed site; NaN where masked | obs, ... |
    | `constant_data` | `labels`, and what else the batch holds | obs |

    Where the whole data set counts as one datum there is no dimension `obs`: sites have dimensions of their own, and
    `log_likelihood` has an entry for each observation, so that `arviz.loo` runs.

    Resampling by weights whose tail is smoothed (Pareto Smoothed Importance Sampling, Vehtari, Simpson, Gelman, Yao and
    Gabry 2024) turns the guide's draws into draws of the posterior as far as they reach: trust `reweighted` where
    `pareto_k` is below 0.7. To compare models by such draws, take these entries of `log_likelihood` too.

    With the `reference` by NUTS its chains stand in place of the guide's draws, and `sample_stats` has `energy`, `lp`
    and `diverging` instead, so that ArviZ's R-hat, effective sample sizes and BFMI are those of the sampler.

    Without it there is one chain, of independent draws. R-hat is not defined for them: without `kind="stats"`,
    `arviz.summary` warns and gives NaN. Nor does `arviz.loo` compare models where each datum has latent variables of
    its own: use `log_evidence` and its Pareto k.

    Args:
        program: any program, or a `Target`.
        x: data, a tensor (n, *x) or a batch dict; none beside a `Target`.
        draws: samples per datum.
        seed: of the draws; the global random state is left alone.
        labels: a name for each datum, shape (n,).
        ids: coordinates of `obs`, one per datum; 0, 1, ... by default.
        reference: of the same data, by NUTS; then `draws` is not used.

    Returns:
        An `arviz.InferenceData` before ArviZ 1.0, an `xarray.DataTree` since. Numbers are in single precision.

    Raises:
        ValueError: If data, labels or ids do not fit, there is no draw or more than memory holds, or a site is named
            like a dimension: `chain`, `draw`, `obs`, or `z_dim_0` beside a site `z`.
    """
    target, draws = Target.of(program, x), check_int("draws", draws)
    n, batch, chains = target.n, target.batch, 1
    if reference is not None:
        if not reference.sample_stats or reference.loc.shape[0] != n:
            raise ValueError(
                f"Expected `reference` to be of these {n} data by NUTS; got one of {len(reference.loc)} data by "
                f"{reference.method}. Make it with reference_posterior(program, x, method='nuts')."
            )
        chains = reference.chains
        draws = len(reference.sample_stats["energy"]) // chains
    for name, given in (("labels", labels), ("ids", ids)):
        if given is not None and len(given) != n:
            raise ValueError(f"Expected `{name}` to have an entry for each of the {n} data; got {len(given)}.")
    size = chains * draws * sum(value.numel() for value in batch.values() if value.is_floating_point())
    if size > _NUMBERS:
        raise ValueError(
            f"Expected at most {_NUMBERS:,} numbers of predictions; got {draws} draws of {n} data, {size:,}. Take "
            "fewer draws or part of the data."
        )
    if reference is None:
        groups = _join([_block(block, draws, (seed, i * BLOCK)) for i, block in enumerate(target.blocks())], "obs")
        weights = torch.from_numpy(groups["sample_stats"]["log_weight"][0])
        with fork_rng(seed, "resample", device=torch.device("cpu")):
            shares = pareto_smoothed(weights).softmax(0).nan_to_num(1.0)
            chosen = torch.multinomial(shares.T, draws, replacement=True).T.numpy()  # (k, n)
        groups["reweighted"] = {name: _pick(array, chosen) for name, array in groups["posterior"].items()}
        own = {"resampled": chosen[None], "elbo": weights.mean(0).numpy(), "pareto_k": pareto_k(weights).numpy()}
        groups["sample_stats"] |= own
    else:
        groups = _sampled(target, reference, seed)
    first = target.rows(slice(0, 1))
    with first.running(seed, "prior"):
        drawn = first.trace("model", draws, poutine.uncondition)
    for group, names in (("prior", target.structure.latents), ("prior_predictive", _data_sites(target, drawn))):
        arrays = {name: _array(target, drawn.nodes[name]) for name in names}
        groups[group] = arrays if target.structure.whole else {name: array[:, :, 0] for name, array in arrays.items()}
    constants = {key: value.cpu().numpy() for key, value in batch.items() if not value.is_floating_point()}
    constants |= {} if labels is None else {"labels": np.asarray(labels)}
    groups |= {"constant_data": constants} if constants else {}
    attributes = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "ppl_vae",
        "inference_library_version": version("ppl-vae"),
        "program": type(target.program).__name__,
        "seed": seed,
    }
    rows = np.arange(n) if ids is None else np.asarray(ids)
    coords = {"chain": np.arange(chains), "draw": np.arange(draws), "obs": rows}
    if target.structure.whole:
        groups["sample_stats"] = {name: array[..., 0] for name, array in groups["sample_stats"].items()}
        del coords["obs"]
    return _contain({group: _dataset(group, arrays, coords, attributes) for group, arrays in groups.items()})


def _block(target: Target, draws: int, key: tuple[int, int]) -> Groups:
    """Draw for a block of data; arrays (chain, draw, obs, ...), those of the data (obs, ...)."""
    parts = []
    for number, start in enumerate(range(0, draws, _DRAWS)):
        with target.running(key[0], "datatree", key[1], number):
            k = min(_DRAWS, draws - start)
            guide = target.trace("guide", k)
            drawn, model = _draw(target, guide, k)
            drawn["sample_stats"] = {"log_weight": target.log_weights(model, guide, k).cpu()[None].numpy()}
        parts.append(drawn)
    mask = target.batch.get("mask")
    data = {name: _seen(target, model.nodes[name], mask) for name in drawn["posterior_predictive"]}
    return _join(parts, "draw") | {"observed_data": data}


def _draw(target: Target, guide: Trace, k: int) -> tuple[Groups, Any]:
    """Draw k times, with the latents of a trace of the guide; the groups without `sample_stats`, the model's trace."""
    model, again = target.trace("model", k, target.replaying(guide)), target.predict(guide, k)
    sites = _data_sites(target, again)
    names = target.structure.latents + target.structure.enumerated
    groups = {
        "posterior": {name: _array(target, again.nodes[name]) for name in names},
        "posterior_predictive": {name: _array(target, again.nodes[name]) for name in sites},
        "log_likelihood": {name: _scores(target, model, k, name) for name in sites},
    }
    return groups, model


def _pick(array: Array, chosen: Array) -> Array:
    """The chosen draws (k, n) of each datum of (1, k, n, ...), or where the whole is one datum, of (1, k, ...)."""
    if chosen.shape[1] == 1:
        return array[:, chosen[:, 0]]
    return np.take_along_axis(array, chosen.reshape(1, *chosen.shape, *(1,) * (array.ndim - 3)), 1)


def _sampled(target: Target, reference: Reference, seed: int) -> Groups:
    """The groups of the chains of NUTS."""
    assert reference.draws is not None
    parts, dtype = [], target.dtype or torch.get_default_dtype()
    for number, z in enumerate(reference.draws.split(_DRAWS)):
        values = {name: value.to(dtype) for name, value in target.layout.unpack(z).items()}
        with target.running(seed, "datatree", number):
            drawn, model = _draw(target, target.trace("guide", len(z), Given(values)), len(z))
        parts.append(drawn)
    stats = {name: value.cpu()[None].numpy() for name, value in reference.sample_stats.items()}
    groups = _join(parts, "draw") | {"sample_stats": stats}
    for arrays in groups.values():
        for name, array in arrays.items():
            arrays[name] = array[0].reshape(-1, reference.chains, *array.shape[2:]).swapaxes(0, 1)
    mask = target.batch.get("mask")
    return groups | {"observed_data": {k: _seen(target, model.nodes[k], mask) for k in drawn["posterior_predictive"]}}


def _join(parts: list[Groups], dimension: str) -> Groups:
    if len(parts) == 1:
        return parts[0]
    return {
        group: {
            name: np.concatenate([part[group][name] for part in parts], _DIMENSIONS[group].index(dimension))
            for name in arrays
        }
        for group, arrays in parts[0].items()
    }


def _data_sites(target: Target, trace: Any) -> list[str]:
    """Names of the observed sites that stand for data."""
    return [name for name in target.structure.observed if not isinstance(trace.nodes[name]["fn"], Unit)]


def _plain(value: Tensor) -> Tensor:
    return value.float().cpu() if value.is_floating_point() else value.cpu()


def _array(target: Target, node: Any) -> Array:
    """A site's value (k, *plates, n, *event) as (1, k, n, *plates, *event), without plates of one."""
    value, event = _plain(node["value"]), node["fn"].event_dim
    if not target.structure.whole:
        value = value.movedim(value.dim() - event - 1, 1)
        kept = [size for size in value.shape[2 : value.dim() - event] if size > 1]
        return value.reshape(1, *value.shape[:2], *kept, *value.shape[value.dim() - event :]).numpy()
    kept = [size for size in value.shape[1 : value.dim() - event] if size > 1]
    return value.reshape(1, len(value), *kept, *value.shape[value.dim() - event :]).numpy()


def _scores(target: Target, model: Any, k: int, name: str) -> Array:
    """Log likelihood of a site: of each datum, (1, k, n), or where the whole is one, of each observation in it."""
    if not target.structure.whole:
        return _plain(target.log_density(model, k, [name]))[None].numpy()
    score = unscaled(model.nodes[name])
    return _plain(score.reshape(1, k, *(size for size in score.shape[1:] if size > 1))).numpy()


def _seen(target: Target, node: Any, mask: Tensor | None) -> Array:
    """An observed value (*plates, n, *event) as (n, *plates, *event), NaN where it is masked."""
    value = _plain(node["value"])
    if not target.structure.whole:
        value = value.movedim(value.dim() - node["fn"].event_dim - 1, 0)
    elif target.structure.sequential:
        value = value[0]
    if mask is not None and mask.shape == value.shape:
        value = value.float().masked_fill(~mask.cpu(), float("nan"))
    return value.numpy()


def _dataset(
    group: str, arrays: dict[str, Array], coords: dict[str, Any], attributes: dict[str, Any]
) -> "xarray.Dataset":
    """Name the dimensions of a group's arrays."""
    import xarray  # which brings pandas, as most runs need neither

    lead, variables = tuple(name for name in _DIMENSIONS[group] if name in coords), {}
    for name, array in arrays.items():
        shared = group == "sample_stats" and name in ("elbo", "pareto_k")
        own = tuple(name for name in lead if name == "obs") if shared else lead
        variables[name] = ([*own, *(f"{name}_dim_{i}" for i in range(array.ndim - len(own)))], array)
    taken = {dimension for dimensions, _ in variables.values() for dimension in dimensions}
    if clash := sorted(taken & variables.keys()):
        raise ValueError(
            f"Expected sites and data by other names than the dimensions of `{group}`, {', '.join(sorted(taken))}; "
            f"got '{clash[0]}'. Rename it in the program."
        )
    coords = coords | {"chain": coords["chain"][:1]} if group.startswith("prior") else coords
    return xarray.Dataset(variables, {name: coords[name] for name in lead}, attributes)


def _contain(groups: "dict[str, xarray.Dataset]") -> Any:
    """Put the groups in the container of the ArviZ that is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
        import xarray

        if arviz.__version__.startswith("0."):  # in 1.x the name InferenceData stands for a DataTree
            container: Any = arviz.InferenceData
            return container(**groups)
    return xarray.DataTree.from_dict(groups)
