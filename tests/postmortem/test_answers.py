"""What src.diagnose and src.replay answer to people with a model and files of their own."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nonfinite import watch
from nonfinite.lightning.rerun_step import AUTOCAST
from src import diagnose, replay
from src.postmortem.given import PRECISIONS
from src.postmortem.load import TRUE_PRECISIONS

MINE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, vocab_size, max_seq_len):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, 8)
        self.places = nn.Embedding(max_seq_len, 8)
        self.head = nn.Linear(8, vocab_size)

    def forward(self, ids):
        return self.head(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(20, 20))

    def forward(self, ids):
        return self.table[ids]
"""

KWARGS = "kwargs={vocab_size:20,max_seq_len:6}"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the working directory, with weights and a batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text(MINE)
    sys.modules.pop("mine", None)
    from mine import Net, Plain

    torch.save(Net(20, 6).state_dict(), "w.pt")
    torch.save(Plain().state_dict(), "plain.pt")
    np.save("ids.npy", np.arange(10).reshape(2, 5))
    yield Net
    sys.modules.pop("mine", None)


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert diagnose.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_missing_arguments_of_a_target_are_named_with_what_to_type(mine, capsys):
    line = refused(capsys, "checkpoint=w.pt", "target=mine:Net", "batch=ids.npy")
    assert (
        "needs vocab_size and max_seq_len; type 'kwargs={vocab_size:...,max_seq_len:...}'" in line
    )
    line = refused(
        capsys, "checkpoint=w.pt", "target=mine:Net", "batch=ids.npy", "kwargs={vocab_size:20}"
    )
    assert "needs max_seq_len; type 'kwargs={max_seq_len:...}'" in line


@pytest.mark.parametrize("section", ["hyper_parameters", "model_args", "config"])
def test_sizes_that_a_checkpoint_holds_are_passed(section, mine, capsys):
    state = mine(20, 6).state_dict()
    torch.save({"state_dict": state, section: {"vocab_size": 20, "max_seq_len": 6}}, "own.ckpt")
    assert diagnose.main(["checkpoint=own.ckpt", "target=mine:Net", "batch=ids.npy"]) == 0
    assert "all values are finite" in capsys.readouterr().out


TARGETS = {
    "mine.py:Net": "must be package.module:callable; type mine:Net",
    "mine:Nett": "mine has no attribute 'Nett'; did you mean mine:Net?",
    "mien:Net": "No module named 'mien' in {here} or among the installed packages; did you mean"
    " mine:Net?",
    "other:Net": "No module named 'other' in {here} or among the installed packages; run the"
    " command in the folder of other.py",
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_mistyped_target_is_answered_with_what_to_type(target, mine, capsys):
    line = refused(capsys, "checkpoint=w.pt", f"target={target}", "batch=ids.npy")
    assert f"target={target}: " in line
    assert TARGETS[target].format(here=Path.cwd()) in line


def test_a_module_that_a_target_needs_itself_is_not_taken_for_the_target(mine, capsys):
    Path("lacks.py").write_text("import not_there\n")
    line = refused(capsys, "checkpoint=w.pt", "target=lacks:Net", "batch=ids.npy")
    told = (
        "error: target=lacks:Net: ModuleNotFoundError: No module named 'not_there' (lacks.py:1)\n"
    )
    assert line == told


def test_a_folder_is_answered_with_the_weights_in_it(mine, capsys):
    Path("hf").mkdir()
    save_file(mine(20, 6).state_dict(), "hf/model.safetensors")
    Path("hf/training_args.bin").touch()
    line = refused(capsys, "checkpoint=hf", "target=mine:Net", "batch=ids.npy")
    assert line == "error: checkpoint=hf: is a folder; type checkpoint=hf/model.safetensors\n"
    assert (
        diagnose.main(
            ["checkpoint=hf/model.safetensors", "target=mine:Net", "batch=ids.npy", KWARGS]
        )
        == 0
    )
    Path("parts").mkdir()
    for number in (1, 2):
        Path(f"parts/model-0000{number}-of-00002.safetensors").touch()
    assert "in 2 files; save model.state_dict() as one" in refused(capsys, "checkpoint=parts")
    Path("own").mkdir()
    for name in ("a.pt", "b.pth"):
        Path("own", name).touch()
    assert "type checkpoint=own/a.pt or checkpoint=own/b.pth" in refused(capsys, "checkpoint=own")


IDS = {
    "large": (np.full((2, 5), 77), "largest token id is 77, and tokens has 20 rows"),
    "long": (np.arange(18).reshape(2, 9), "rows have 8 tokens, and places has 6 rows"),
    "target": (np.array([[1, 2, 20]]), "the largest token id is 20, and its rows have 2 tokens"),
}


@pytest.mark.parametrize("which", IDS)
def test_a_batch_that_does_not_fit_is_told_with_its_sizes(which, mine, capsys):
    ids, said = IDS[which]
    np.save("bad.npy", ids)
    line = refused(capsys, "checkpoint=w.pt", "target=mine:Net", "batch=bad.npy", KWARGS)
    assert line.startswith("error: batch: the model does not accept it: IndexError")
    assert said in line


def test_where_no_embedding_is_known_the_largest_id_is_named(mine, capsys):
    np.save("bad.npy", np.array([[1, 33, 2]]))
    line = refused(capsys, "checkpoint=plain.pt", "target=mine:Plain", "batch=bad.npy")
    assert "the largest token id is 33, and its rows have 2 tokens" in line


def test_a_whole_model_is_answered_with_what_to_save(mine, capsys):
    torch.save(mine(20, 6), "whole.pt")
    line = refused(capsys, "checkpoint=whole.pt", "target=mine:Net", "batch=ids.npy", KWARGS)
    assert "holds a mine.Net, which cannot be read without running code" in line
    assert "save model.state_dict() with torch.save" in line


def test_a_text_needs_a_checkpoint_of_this_project(mine, capsys):
    Path("mine.txt").write_text("some text")
    line = refused(capsys, "checkpoint=w.pt", "target=mine:Net", "batch=mine.txt", KWARGS)
    assert "no tokenizer for a text, as those of this project have; type a .npy file" in line


class Divides(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x):
        return super().forward(x) / (x - x)


def test_an_incident_of_watch_is_sent_to_its_own_command(mine, capsys):
    model = Divides()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch(model, optimizer)
    model(torch.ones(2, 2)).mean().backward()
    optimizer.step()
    line = refused(capsys, "checkpoint=incidents/step-1", "target=mine:Net")
    assert "was written by watch(); type python -m nonfinite incidents/step-1 --model" in line
    line = refused(capsys, "checkpoint=incidents")
    assert (
        line == "error: checkpoint=incidents: holds incidents; type checkpoint=incidents/step-1\n"
    )


LIGHTNING = """
import lightning.pytorch as pl
import torch
from nonfinite.lightning import Nonfinite


class Yours(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        x = self.inner(batch)
        return (x / (x - x)).mean() if batch_idx in (2, 4) else x.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit():
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[Nonfinite()],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(Yours(), torch.utils.data.DataLoader(torch.ones(12, 4), batch_size=2))
"""


def test_a_lightning_script_without_a_guard_leaves_its_incident(mine, capsys):
    Path("lit.py").write_text(LIGHTNING)
    import lit

    lit.fit()
    said = capsys.readouterr().out
    folder = Path("incidents/step-3")
    command = f"python -m src.diagnose checkpoint={folder} target=lit:Yours"
    assert f"  next: {command}\n" in said
    assert "2 of 6 steps were not finite and were skipped, the first at step 3\n" in said
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    del sys.modules["lit"]
    Path("lit.py").write_text(f"{LIGHTNING}\n\nfit()\n")
    assert diagnose.main([*command.split(" ")[3:], "format=json"]) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out)["reproduced"]
    assert "warning: lit: its training code runs again, because it has no" in answer.err
    assert answer.err.count("its training code runs again") == 1
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    del sys.modules["lit"]


@pytest.mark.parametrize(
    "depth", ["mine", "mine/arm", "mine/arm/seed-0", "mine/arm/seed-0/incidents"]
)
def test_a_folder_above_incidents_is_answered_with_those_in_it(depth, mine, capsys):
    steps = [Path("runs/mine/arm/seed-0/incidents", f"step-{step}") for step in (5, 6, 7, 8)]
    for step in steps:
        step.mkdir(parents=True)
        (step / "state.pt").touch()
    capsys.readouterr()
    assert replay.main([f"incident=runs/{depth}"]) == 2
    assert capsys.readouterr().err == (
        f"error: incident=runs/{depth}: holds incidents; type incident={steps[0]} or"
        f" incident={steps[1]} or incident={steps[2]}; 1 more\n"
    )


def test_a_path_that_is_no_incident_is_answered_with_its_form(mine, capsys):
    Path("runs/empty").mkdir(parents=True)
    step = Path("step-3")
    step.mkdir()
    (step / "state.pt").touch()
    (step / "incident.json").touch()
    for path, said in {
        "runs/empty": "holds no incident; the folder of an incident is runs/<study>",
        "runs/nope": "no such folder; that of an incident is runs/<study>",
        "step-3/state.pt": "type incident=step-3\n",
        "step-3/incident.json": "type incident=step-3\n",
        "mine.py": "must be the folder of an incident; it is runs/<study>",
    }.items():
        capsys.readouterr()
        assert replay.main([f"incident={path}"]) == 2
        assert said in capsys.readouterr().err, path


def test_the_precisions_that_can_be_typed_are_those_that_can_be_run():
    assert (*AUTOCAST, *TRUE_PRECISIONS) == PRECISIONS
