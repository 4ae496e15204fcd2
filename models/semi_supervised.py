"""Labels for some of the data, in plain Pyro: a class y and a style z behind x; y is summed out where it is missing."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from ppl_vae import unique_name


def layers(size: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with tanh between them."""
    return nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def join(*parts: Tensor) -> Tensor:
    """Concatenate features, whose batches broadcast."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


class SemiSupervised(nn.Module):
    """p(y) p(z) p(x|y, z), x normal, and q(y|x) q(z|x, y); y = -1 is missing (Kingma et al. 2014, M2 and equation 9).

    The bound of labelled data does not train q(y|x): `weight` times log q(y|x) is added to it while training.
    """

    def __init__(self, features: int, latent: int, *, classes: int = 10, hidden: int = 200, weight: float = 1) -> None:
        super().__init__()
        self.latent, self.classes, self.weight = latent, classes, weight
        self.logits, self.raw_scale = nn.Parameter(torch.zeros(classes)), nn.Parameter(torch.tensor(-1.0))
        self.classifier = layers(features, hidden, classes)
        self.encoder = layers(features + classes, hidden, 2 * latent)
        self.decoder = layers(latent + classes, hidden, features)

    def label(self, y: Tensor, logits: Tensor) -> Tensor:
        """One-hot labels: y where it is known, where the latent class is a uniform dummy; else the latent class."""
        logits = torch.where(y.unsqueeze(-1) < 0, logits, 0.0)
        guess = pyro.sample("class", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        return one_hot(torch.where(y < 0, guess, y), self.classes).to(logits)

    def model(self, x: Tensor, y: Tensor) -> None:
        """Draw the class where it is missing, and z; score the known labels and x."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            label = self.label(y, self.logits)
            pyro.sample("y", dist.Categorical(logits=self.logits).expand(y.shape).mask(y >= 0), obs=y.clamp(min=0))
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(join(z, label)), softplus(self.raw_scale)).to_event(1), obs=x)
            if self.training and self.weight:
                with pyro.poutine.scale(scale=self.weight):
                    pyro.sample("label", dist.Categorical(logits=self.classifier(x)).mask(y >= 0), obs=y.clamp(min=0))

    def guide(self, x: Tensor, y: Tensor) -> None:
        """Draw the class given x, and z given both."""
        pyro.module(unique_name(self), self)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(join(x, self.label(y, self.classifier(x)))).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw) + 1e-6).to_event(1))
