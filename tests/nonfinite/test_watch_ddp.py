"""`watch` in processes that train together."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nonfinite import watch
from tests.nonfinite.watched import Divides, loop, normed, same


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def distributed(rank: int, world: int, store: str, bad_rank: int | None, add: bool) -> None:
    """One process of a distributed run, which writes what it has to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = f"file://{store}"
    torch.distributed.init_process_group("gloo", place, rank=rank, world_size=world)
    try:
        model = nn.Sequential(normed()[:2], Divides(8))
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        handle = watch(parallel, optimizer) if add else None
        bad = torch.nan if rank == bad_rank else None
        states = loop(model, optimizer, called=parallel, at=2 if rank == bad_rank else -1, bad=bad)
        incidents = [] if handle is None else handle.incidents
        torch.save((states, incidents), f"{store}-{rank}")
    finally:
        torch.distributed.destroy_process_group()


def ran_distributed(world: int, bad_rank: int | None = None, *, add: bool = True) -> list[Any]:
    store = str(Path(f"store-{world}-{bad_rank}-{add}").absolute())
    if world == 1:
        distributed(0, 1, store, bad_rank, add)
    else:
        torch.multiprocessing.spawn(distributed, (world, store, bad_rank, add), nprocs=world)
    return [torch.load(f"{store}-{rank}") for rank in range(world)]


WORLDS = [1, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
def test_distributed_processes_end_with_the_same_bits(world):
    plain, watched = ran_distributed(world, add=False), ran_distributed(world)
    assert same([states for states, _ in watched], [states for states, _ in plain])
    assert not any(incidents for _, incidents in watched)


@pytest.mark.parametrize("world", WORLDS)
def test_the_process_with_the_bad_row_names_it(world):
    for rank, (states, incidents) in enumerate(ran_distributed(world, world - 1)):
        assert same(states[3], states[2]) and not same(states[4], states[3])
        assert [incident["step"] for incident in incidents] == [3]
        assert rank < world - 1 or incidents[0]["cause"] == "bad batch"


@pytest.mark.slow
def test_the_saved_incident_is_that_of_the_process_with_the_bad_row():
    ran_distributed(2, 1)
    assert "bad batch" in Path("incidents/step-3/incident.html").read_text()
