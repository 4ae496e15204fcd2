"""A few cases of each attack on runs; `soak.py` tries them all."""

import pytest
import torch
from attacks import (
    World,
    bad_places,
    flips_and_cuts,
    hostile_data,
    hostile_runs,
    ignored_signals,
    kills_while_writing,
    mutated_data,
    mutated_specs,
    races,
    random_kills,
    signals,
)
from cases import command

QUICK = {
    "kills in fit": lambda world: kills_while_writing(world, "fit", (9, 40, 77)),
    "kills in fit --force": lambda world: kills_while_writing(world, "force", (60,)),
    "kills in evaluate": lambda world: kills_while_writing(world, "evaluate", (30, 48)),
    "kills in a resumed fit": lambda world: kills_while_writing(world, "resume", (35,)),
    "random kills": lambda world: random_kills(world, 2),
    "signals": lambda world: signals(world, ("SIGINT", "SIGHUP"), (True,)),
    "ignored signals": lambda world: ignored_signals(world, ("SIGHUP",)),
    "flips and cuts": lambda world: flips_and_cuts(world, 60),
    "hostile runs": hostile_runs,
    "hostile data": hostile_data,
    "mutated specs": lambda world: mutated_specs(world, 60),
    "mutated data": lambda world: mutated_data(world, 60),
    "races": races,
    "bad places": bad_places,
}


@pytest.fixture(autouse=True)
def _as_users_run():
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("attack", QUICK)
def test_nothing_is_lost(attack, world):
    outcomes = list(QUICK[attack](world))
    assert outcomes
    assert [(case, lost) for case, lost in outcomes if lost] == []


def test_an_attack_would_notice_a_run_that_is_written_in_place(world, monkeypatch):
    """Broken on purpose: files are written into the run itself, without a swap."""
    from ppl_vae.runs import places

    def in_place():
        monkeypatch.setattr(places, "_partial", _same)

    place = world.fresh("run")
    status, _ = command(["fit", world.spec, "--out", place], world.log)
    assert status == 0
    status, said = command(["evaluate", place], world.log, in_place)
    assert status != 0, said


def _same(folder):
    import contextlib

    return contextlib.nullcontext(folder)
