"""What each rewriting of a captured graph gains, and whether PyTorch's inductor makes up for it.

python benchmarks/rewrites.py [--rounds 8] [--out benchmarks/results/rewrites.json]

A density and its gradient as annealing evaluates them, the weights of a block of evidence, and a training step are
recorded with all rewritings, without one of them at a time, and without any, then compiled by inductor. All on one
thread, in turns, as ratios to the graph with all of them.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pyro
import torch
from clock import pair, ratios, record, show
from torch import Tensor
from torch.fx import GraphModule

from ppl_vae import VAE, Target
from ppl_vae.programs import capture
from ppl_vae.programs.traces import trace_pair

REWRITINGS = {
    "_simpler": lambda node, *rest: node,
    "_cheaper": lambda node: node,
    "faster": lambda node, **rest: node,
    "_reuse": lambda graph, given: None,
}


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Leave some rewritings out."""
    with patch.multiple(capture, **{name: REWRITINGS[name] for name in names}):
        yield


def density(vae: VAE, x: Tensor, chains: int) -> tuple[Callable[..., Any], list[Tensor], bool]:
    """Evaluate log p(x, z) and its gradient by z, as annealing does."""

    def function(z: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            own = z.detach().requires_grad_()
            joint = vae.prior().log_prob(own) + vae.likelihood(own).log_prob(x)
            return joint.detach(), *torch.autograd.grad(joint.sum(), own)

    return function, [torch.randn(chains, len(x), *vae.prior().event_shape)], True


def weights(vae: VAE, x: Tensor, samples: int) -> tuple[Callable[..., Any], list[Tensor], bool]:
    """Log weights of a block of evidence."""
    target = Target(vae, x)
    nesting = target.structure.nesting

    def function(x: Tensor) -> Tensor:
        model, guide = trace_pair(vae, {"x": x}, samples, nesting)
        return target.log_density(model, samples) - target.log_density(guide, samples)

    return function, [x], False


def step(vae: VAE, x: Tensor) -> tuple[Callable[..., Any], list[Tensor], bool]:
    """Minus the ELBO of a batch, and its gradients."""
    learned = [*vae.parameters()]

    def function(x: Tensor, *learned_: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            model, guide = trace_pair(vae, {"x": x}, 1, 1)
            loss = guide.log_prob_sum() - model.log_prob_sum()
            return loss.detach(), *torch.autograd.grad(loss, learned)

    return function, [x, *learned], False


def recorded(function: Callable[..., Any], given: list[Tensor], reuse: bool) -> GraphModule:
    """Record a function, on kept memory where asked to."""
    with pyro.validation_enabled(False):  # it looks at values
        graph = capture.record(function, given)
    if reuse:
        capture._reuse(graph, given)
        graph.recompile()
    return graph


def compare(work: tuple[Callable[..., Any], list[Tensor], bool], rounds: int, calls: int) -> dict[str, Any]:
    """Time a function recorded in each way."""
    function, given, reuse = work
    graphs: dict[str, Callable[..., Any]] = {}
    for name in REWRITINGS:
        with without(name):
            graphs[f"without {name}"] = recorded(function, given, reuse)
    with without(*REWRITINGS):
        plain = recorded(function, given, reuse)
    graphs |= {"without any": plain, "without any, by inductor": torch.compile(plain)}
    graphs["with all"] = recorded(function, given, reuse)

    def run(graph: Callable[..., Any]) -> Callable[[], None]:
        def repeat() -> None:
            with torch.no_grad():
                for _ in range(calls):
                    graph(*given)

        return repeat

    return ratios({name: run(graph) for name, graph in graphs.items()}, rounds, calls)


def main() -> None:
    """Run all and print a table; write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    large, small = pair(784, [200, 200], 50), pair(64, [200], 10)
    x, y = (torch.rand(100, 784) < 0.13).float(), (torch.rand(100, 64) < 0.5).float()
    found = {
        "density and gradient, 784-200-200-50, 16 chains of 100 images": compare(
            density(large, x, 16), given.rounds, 20
        ),
        "density and gradient, 64-200-10, 16 chains of 100 images": compare(density(small, y, 16), given.rounds, 100),
        "weights, 784-200-200-50, 100 draws of 100 images": compare(weights(large, x, 100), given.rounds, 4),
        "weights, 64-200-10, 100 draws of 100 images": compare(weights(small, y, 100), given.rounds, 20),
        "training step, 784-400-20, batch 100": compare(step(pair(784, [400], 20), x), given.rounds, 40),
        "training step, 64-200-10, batch 100": compare(step(small, y), given.rounds, 200),
    }
    for title, rows in found.items():
        show(title, rows)
    record(found, given.out)


if __name__ == "__main__":
    main()
