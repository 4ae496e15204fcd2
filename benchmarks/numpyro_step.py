"""NumPyro's jitted steps of the VAE that `speed.py` times: as many as each line of input says.

It runs in an environment of its own, with JAX, on one thread: python benchmarks/numpyro_step.py 784 400 20 128
Each answer is a line with the seconds and the processor's seconds that the steps took.
"""

import os
import sys
import time
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO


def dense(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
    """Make the weights of a layer."""
    return {"w": random.normal(key, (inputs, outputs)) / inputs**0.5, "b": jnp.zeros(outputs)}


def layer(part: dict[str, Any], x: Any) -> Any:
    """Apply a layer."""
    return x @ part["w"] + part["b"]


def main(features: int, hidden: int, latent: int, batch: int) -> None:
    """Answer until the input ends."""
    keys = random.split(random.PRNGKey(0), 5)
    encoder = [dense(keys[0], features, hidden), dense(keys[1], hidden, 2 * latent)]
    decoder = [dense(keys[2], latent, hidden), dense(keys[3], hidden, features)]

    def model(x: Any) -> None:
        parts = numpyro.param("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            logits = layer(parts[1], jnp.tanh(layer(parts[0], z)))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        parts = numpyro.param("encoder", encoder)
        loc, raw = jnp.split(layer(parts[1], jnp.tanh(layer(parts[0], x))), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(raw) + 1e-6).to_event(1))

    data = (random.uniform(keys[4], (10 * batch, features)) < 0.13).astype(jnp.float32)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = svi.init(keys[4], data[:batch])

    @jax.jit
    def step(state: Any, number: Any) -> Any:
        return svi.update(state, lax.dynamic_slice_in_dim(data, number % 10 * batch, batch))

    for line in sys.stdin:
        began = time.perf_counter(), time.process_time()
        for number in range(int(line)):
            state, loss = step(state, number)
        jax.block_until_ready(loss)
        print(time.perf_counter() - began[0], time.process_time() - began[1], flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
