"""`VAEEstimator`: a variational autoencoder that follows the conventions of scikit-learn."""

import math
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ppl_vae._checks import check_int
from ppl_vae._seeds import fork_rng
from ppl_vae.data.columns import Columns
from ppl_vae.evaluation.evidence import Evidence
from ppl_vae.infer.svi import fit
from ppl_vae.programs.param_store import mode
from ppl_vae.runs.spec import Spec

_ENTRIES = 2**22  # numbers that one block of draws may hold
Part = str | dict[str, Any]


class VAEEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A variational autoencoder of a table, for pipelines, cross-validation and grid search.

    Parts and settings are those of a spec: a part is the name of a family, or a table of its name and keys,
    `{"family": "MixtureNormal", "components": 5}`.

    Scores of rows use one set of draws for all of them, so that a row's score does not depend on the rows beside it;
    `score_error` allows for that.

    Args:
        latent: number of latent variables.
        prior: p(z).
        likelihood: p(x|z); its network has the `hidden` layers, none for a linear one.
        posterior: q(z|x), `Normal` or `FullNormal`.
        hidden: sizes of the hidden layers of both networks; empty for linear ones.
        elbo: as in `fit`.
        epochs: passes over the data.
        batch_size: data per step.
        learning_rate: of the optimiser.
        schedule: of the learning rate, as in `fit`.
        samples: importance samples per row of a score.
        random_state: an integer, a numpy generator, or None for other numbers each time.

    Attributes:
        program_: the fitted `VAE`.
        history_: the `History` of its training.
        n_features_in_: number of columns.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from ppl_vae.estimator import VAEEstimator
        >>> x = load_iris().data
        >>> VAEEstimator(2, hidden=(), epochs=5, random_state=0).fit_transform(x).shape
        (150, 2)
    """

    def __init__(
        self,
        latent: int = 2,
        *,
        prior: Part = "StandardNormal",
        likelihood: Part = "Normal",
        posterior: Part = "Normal",
        hidden: tuple[int, ...] = (64,),
        elbo: str = "TraceMeanField_ELBO",
        epochs: int = 100,
        batch_size: int = 100,
        learning_rate: float = 3e-3,
        schedule: str = "one-cycle",
        samples: int = 100,
        random_state: Any = None,
    ) -> None:
        self.latent = latent
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior
        self.hidden = hidden
        self.elbo = elbo
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.samples = samples
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803  as scikit-learn calls it
        """Fit to rows (n, x); y is ignored.

        Raises:
            ValueError: If a parameter or the data will not do.
        """
        x = torch.from_numpy(self._rows(X, reset=True))
        self._seed = int(check_random_state(self.random_state).randint(2**31))
        spec, n = self._spec(), len(x)
        with fork_rng(self._seed, "build", device=torch.device("cpu")):
            program = spec.assemble(columns=Columns(x.shape[1]), rows=n).to(x.dtype).initialise(x)
        settings = spec.training | {"seed": self._seed}
        self.history_ = fit(program, x, **settings, device="cpu", progress=False)
        self.program_ = program.eval()
        self._n_features_out = self.latent
        return self

    def _spec(self) -> Spec:
        """The spec that the parameters stand for."""
        network = {"family": "MLP", "hidden": list(self.hidden)} if len(self.hidden) else {"family": "Linear"}

        def part(given: Part, **keys: Any) -> dict[str, Any]:
            return {**keys, **({"family": given} if isinstance(given, str) else dict(given))}

        likelihood = part(self.likelihood, network=network)
        if likelihood["family"] == "Normal":
            likelihood.setdefault("scale", "shared")
        posterior = part(self.posterior, network=network)
        if posterior["family"] not in ("Normal", "FullNormal"):
            raise ValueError(f"Expected `posterior` to be Normal or FullNormal; got {posterior['family']}.")
        svi = {key: getattr(self, key) for key in ("elbo", "epochs", "batch_size", "learning_rate", "schedule")}
        tables = {"data": {"name": "rows.npy"}, "model": {"latent": self.latent}, "prior": part(self.prior), "svi": svi}
        return Spec.from_dict({**tables, "likelihood": likelihood, "posterior": posterior}, "VAEEstimator")

    def _rows(self, X: Any, *, reset: bool = False) -> npt.NDArray[Any]:  # noqa: N803
        rows = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=2 if reset else 1)
        return np.array(rows, order="C")

    def _guide(self, X: Any) -> tuple[Tensor, Any]:  # noqa: N803
        check_is_fitted(self)
        x = torch.from_numpy(self._rows(X))
        dtype = next(self.program_.parameters()).dtype
        return x.to(dtype), self.program_.approximate(x.to(dtype))

    @torch.no_grad()
    def transform(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Posterior means of the latent variables, (n, z)."""
        _, q = self._guide(X)
        return q.mean.numpy()  # type: ignore[no-any-return]

    @torch.no_grad()
    def inverse_transform(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """Means of p(x|z) at latent variables (n, z), (n, x)."""
        check_is_fitted(self)
        z = torch.as_tensor(np.asarray(X), dtype=next(self.program_.parameters()).dtype)
        if z.ndim != 2 or z.shape[1] != self.latent:
            raise ValueError(f"Expected latent variables of shape (n, {self.latent}); got {tuple(z.shape)}.")
        return self.program_.likelihood(z).mean.numpy()  # type: ignore[no-any-return]

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:  # noqa: N803
        """Importance-weighted log p(x) of each row in nats, (n,)."""
        return self.evidence(X).log_evidence.numpy()  # type: ignore[no-any-return]

    def score(self, X: Any, y: Any = None) -> float:  # noqa: N803
        """Mean of log p(x) over the rows, in nats per row; `score_error` is its Monte Carlo error."""
        return float(self.score_samples(X).mean())

    @torch.no_grad()
    def score_error(self, X: Any) -> float:  # noqa: N803
        r"""Monte Carlo standard error of `score`, which allows for the draws that all rows share.

        :math:`\mathrm{sd}_i\big(\frac1n \sum_x w_i(x) / \bar w(x)\big) / \sqrt k`, by the delta method.
        """
        weights = torch.cat(list(self._weights(X)), 1)
        shares = (weights - weights.logsumexp(0)).exp() * len(weights)
        return float(shares.mean(1).std() / math.sqrt(len(weights)))

    @torch.no_grad()
    def evidence(self, X: Any) -> Evidence:  # noqa: N803
        """Evidence of each row, with its error, bias and verdict, by draws that all rows share."""
        return Evidence.of(torch.cat(list(self._weights(X)), 1))

    def _weights(self, X: Any) -> Any:  # noqa: N803
        """Log importance weights (k, n), in blocks of rows."""
        x, _ = self._guide(X)
        k = check_int("samples", self.samples, 2)
        with fork_rng(self._seed, "score", device=torch.device("cpu")):
            noise = torch.randn(k, 1, self.latent, dtype=x.dtype)
        with mode(self.program_):
            for rows in x.split(max(1, _ENTRIES // (k * x.shape[1]))):
                q = self.program_.approximate(rows)
                tril = getattr(q, "scale_tril", None)
                z = q.mean + (noise * q.stddev if tril is None else (tril @ noise.unsqueeze(-1)).squeeze(-1))
                model = self.program_.prior().log_prob(z) + self.program_.likelihood(z).log_prob(rows)
                yield (model - q.log_prob(z)).double()

    def sample(self, n_samples: int = 1) -> npt.NDArray[Any]:
        """Draw rows from the model, (n, x); each call gives the same."""
        check_is_fitted(self)
        return self.program_.sample(check_int("n_samples", n_samples), seed=self._seed).numpy()  # type: ignore[no-any-return]
