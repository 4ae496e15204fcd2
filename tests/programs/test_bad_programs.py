"""Programs that meddle with Pyro's parameter store, or put a global site where data are."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl_vae import Program, check_guide, fit, log_evidence

DATA = {"y": torch.tensor([0.5, 1.5, -0.5])}


def model(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def learning(y: Tensor) -> None:
    pyro.sample("m", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.0)), 0.5))


@pytest.mark.parametrize("how", ["clears", "writes", "deletes"])
def test_a_program_that_changes_the_store_does_so_in_its_own(how: str) -> None:
    store = pyro.get_param_store()
    pyro.param("mine", torch.tensor(7.0))

    def meddling(y: Tensor) -> None:
        if how == "clears" and "mine" in store:
            pyro.clear_param_store()
        elif how == "writes":
            store["mine"] = torch.tensor(-1.0)
        elif how == "deletes" and "mine" in store:
            del store["mine"]
        model(y)

    program = Program(meddling, learning)
    fit(program, DATA, epochs=3, learning_rate=0.1, progress=False)
    check_guide(program, DATA, samples=30)
    assert list(store.keys()) == ["mine"]
    assert float(pyro.param("mine").detach()) == 7.0


def test_a_global_site_in_the_data_plate_of_one_of_the_two_is_named() -> None:
    def inside(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("m", dist.Normal(y / 2, 0.5))

    with pytest.raises(
        ValueError, match=r"site 'm' to have one size in model and guide; it has 1 .* and \d in the guide"
    ):
        log_evidence(Program(model, inside), DATA, 2)

    def deep(y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-2):
            m = pyro.sample("m", dist.Normal(torch.zeros(1), 1.0))
            pyro.sample("y", dist.Normal(m, 1.0), obs=y.unsqueeze(-1))

    with pytest.raises(ValueError, match="data plate 'data' as the outermost one at dim -1; it is at dim -2"):
        log_evidence(Program(deep, "AutoNormal"), DATA, 2)


def test_a_guide_made_for_another_number_of_data() -> None:
    def rows(y: Tensor) -> None:
        with pyro.plate("groups", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + pyro.sample("m", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    program = Program(rows, data_plate=None)
    fit(program, DATA, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"Expected .* data|Make the guide for these data"):
        log_evidence(program, {"y": torch.zeros(5)}, 2)
    with pytest.raises(ValueError, match="Expected data named y; got x"):
        log_evidence(program, {"x": torch.zeros(3, 1)}, 2)
