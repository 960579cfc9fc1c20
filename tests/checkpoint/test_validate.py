"""States that were tampered with, or lack something, get one line."""

from pathlib import Path

import pytest
import torch

from src import diagnose, replay
from tests.conftest import TINY
from tests.nonfinite.test_recorder import FAILING
from tests.runs import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_cache):
    """A run with an incident."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        return train([*TINY, f"paths.cache={shared_cache}"], *FAILING).resolve()


def said(capsys, command, *arguments: str) -> str:
    capsys.readouterr()
    assert command.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


FIELDS = {
    "incident": [None, {}, {"step": "a", "line": "", "finding": None}],
    "state_dict": [[1], {1: torch.ones(1)}, {"a": 1}],
    "batches": [None, [], [{"a": 1}], 3],
    "precision": [None, 16],
    "matmul_precision": ["zz", None],
    "threads": [0, "a", True],
    "router_values": [None, {"model": 3}],
    "config": [{"recipe": {}}, {"kinds": {}}, {"kinds": 3}, {"arguments": None}],
    "tokenizer": [None, {"x": 1}, {"kind": "zz"}],
}
"""Values that stand for none; of config, sections in place of its own."""


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_an_incident_that_is_missing_or_none_is_named(field, folder, capsys, tmp_path):
    (place,) = (folder / "incidents").iterdir()
    kept = torch.load(place / "state.pt", weights_only=True)
    (tmp_path / "step-1").mkdir()
    file = tmp_path / "step-1" / "state.pt"
    values = FIELDS[field]
    if field == "config":
        values = [{**kept["config"], **value} for value in values]
    for state in [{**kept, field: value} for value in values]:
        torch.save(state, file)
        line = f"={file.parent}: is damaged: {field} has unexpected content"
        assert line in said(capsys, diagnose, f"checkpoint={file.parent}")
        assert line in said(capsys, replay, f"incident={file.parent}")
    torch.save({name: value for name, value in kept.items() if name != field}, file)
    missing = said(capsys, diagnose, f"checkpoint={file.parent}")
    # Without its configuration it is an incident of somebody else's.
    assert ("target=null" if field == "config" else f"{field} is missing") in missing
    assert str(file.parent) in said(capsys, replay, f"incident={file.parent}")


def test_an_entry_of_a_batch_must_hold_what_the_step_saw(folder, capsys, tmp_path):
    (place,) = (folder / "incidents").iterdir()
    state = torch.load(place / "state.pt", weights_only=True)
    file = tmp_path / "state.pt"
    for field, value in (
        ("rng", None),
        ("rng", torch.zeros(3, dtype=torch.uint8)),
        ("router_state", []),
        ("cuda_rng", 3),
    ):
        torch.save({**state, "batches": [{**state["batches"][0], field: value}]}, file)
        assert "batches has unexpected content" in said(capsys, diagnose, f"checkpoint={file}")


def test_a_checkpoint_of_a_run_is_looked_at_too(folder, capsys, tmp_path):
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    file = tmp_path / "last.ckpt"
    for field in ("tokenizer", "global_step", "state_dict"):
        torch.save({name: value for name, value in kept.items() if name != field}, file)
        assert f"{field} is missing" in said(capsys, diagnose, f"checkpoint={file}")


def test_what_is_no_incident_of_a_run_is_not_replayed(capsys, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "state.pt")
    error = said(capsys, replay, f"incident={Path(tmp_path)}")
    assert "is not an incident of a run of src.train" in error
