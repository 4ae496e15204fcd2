"""Latent Dirichlet allocation in plain Pyro (Blei, Ng and Jordan 2003): topics of words are enumerated, shares drawn.

program = DirichletAllocation(35, topics=6)
fit(program, counts, elbo="TraceEnum_ELBO", epochs=100)
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae import unique_name


class DirichletAllocation(nn.Module):
    """p(theta) = Dirichlet, p(topic) = theta, p(word|topic) learned; x (n, features) counts the words of documents."""

    def __init__(self, features: int, *, topics: int = 4, words: int = 20, hidden: int = 32) -> None:
        super().__init__()
        self.most = words
        self.raw_prior = nn.Parameter(torch.zeros(topics))
        self.logits = nn.Parameter(torch.randn(topics, features))
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, topics))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Words of each document in order, at most `words` at even distances, and which of them there are."""
        ends, place = x.clamp_min(0).cumsum(-1), torch.arange(self.most, device=x.device)
        total = ends[:, -1:]
        length = total.clamp(max=self.most)
        words = torch.searchsorted(ends.contiguous(), (place + 0.5) * total / length.clamp_min(1))
        return words.clamp(max=x.shape[1] - 1).T, (place < length).T

    def model(self, x: Tensor) -> None:
        """Draw each document's shares, and sum over the topic of each of its words."""
        pyro.module(unique_name(self), self)
        words, there = self.read(x)
        with pyro.plate("data", len(x), dim=-1):
            theta = pyro.sample("theta", dist.Dirichlet(softplus(self.raw_prior)))
            with pyro.plate("words", self.most, dim=-2), poutine.mask(mask=there):
                topic = pyro.sample("topic", dist.Categorical(theta), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(logits=self.logits[topic]), obs=words)

    def guide(self, x: Tensor) -> None:
        """Draw the shares given the frequencies of words: the prior, and a count of words for each topic."""
        pyro.module(unique_name(self), self)
        total = x.sum(-1, keepdim=True).clamp_min(1)
        counts = total.clamp(max=self.most) * self.encoder(x / total).softmax(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("theta", dist.Dirichlet(softplus(self.raw_prior) + counts))
