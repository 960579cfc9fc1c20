"""The last lines of a run say what became of it, and what to type next."""

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from src import replay
from src.common.record import verdict
from src.generation.prompts import WRITEUP
from src.train import main
from tests.runs import record, train

INCIDENT = {"step": 3, "module": "m", "cause": "router underflow", "line": "step 3: m: 0/0"}


def a_record(*, bad=(), skipped=None, **changes):
    guard = {
        "nonfinite_loss_steps": len(bad),
        "skipped_steps": len(bad) if skipped is None else skipped,
        "first_nonfinite_step": bad[0] if bad else None,
        "nonfinite_steps": list(bad),
    }
    values = {"status": "finished", "outcome": "intermittent", "steps": 10, "own_steps": 10}
    return values | {"guard": guard, "incident": INCIDENT, "alarms": []} | changes


ALL = range(1, 11)
VERDICTS = {
    "clean": (a_record(outcome="clean", incident=None), None),
    "intermittent": (
        a_record(bad=[3, 4]),
        "intermittent: 2 of 10 steps were not finite, the first at step 3: router underflow",
    ),
    "collapsed": (
        a_record(bad=range(3, 11), outcome="collapsed"),
        "collapsed: 8 of 10 steps were not finite, the first at step 3: router underflow",
    ),
    "failed": (
        a_record(bad=[3], status="failed", outcome=None),
        "failed: 1 of 10 steps were not finite, the first at step 3: router underflow",
    ),
    "failed by its second step": (
        a_record(bad=[2], steps=1, own_steps=1, status="failed", outcome=None, incident=None),
        "failed: 1 of 2 steps were not finite, the first at step 2",
    ),
    "failed by its first step": (
        a_record(bad=[1], skipped=0, steps=0, own_steps=0, status="failed", outcome=None),
        "nothing was learned: the only step was not finite"
        " (non-finite loss from step 1: router underflow)",
    ),
    "without a recorder": (
        a_record(bad=[3], incident=None),
        "intermittent: 1 of 10 steps were not finite, the first at step 3",
    ),
    "stopped by a warning": (
        a_record(outcome="stopped", incident=None, alarms=[{"line": "step 5: logits grow"}]),
        "stopped by an early warning: step 5: logits grow",
    ),
    "nothing learnt": (
        a_record(bad=ALL, outcome="collapsed"),
        "nothing was learned: all 10 steps were skipped"
        " (non-finite loss from step 1: router underflow)",
    ),
    "nothing learnt, nothing skipped": (
        a_record(bad=ALL, skipped=0, incident=None, outcome="collapsed"),
        "nothing was learned: all 10 steps were not finite (non-finite loss from step 1)",
    ),
    "one step": (
        a_record(bad=[1], steps=1, own_steps=1, outcome="stopped"),
        "nothing was learned: the only step was skipped"
        " (non-finite loss from step 1: router underflow)",
    ),
    "branch": (
        a_record(bad=[3, 8, 9, 10], own_steps=3, outcome="collapsed"),
        "nothing was learned: all 3 steps were skipped"
        " (non-finite loss from step 8: router underflow)",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_a_run_that_was_not_clean_is_told_in_one_line(case):
    found, line = VERDICTS[case]
    assert verdict(found) == line


class Broken(nn.Module):
    """Its weights are sound, its logits never."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.table(tokens_BT) / 0.0


def broken(*, vocab_size: int, max_seq_len: int) -> nn.Module:
    return Broken(vocab_size)


def last_lines(shown: str, number: int) -> list[str]:
    return shown.strip().splitlines()[-number:]


def test_a_run_that_learnt_nothing_says_so_in_its_last_line_each_time(tiny, capsys):
    parts = ("model.", "ffn.", "attention.")
    arguments = [a for a in tiny if not a.startswith(parts)]
    arguments += ["model=external", "model.target=tests.run.test_outcome:broken"]
    # The second time it is finished already.
    for _ in range(2):
        assert main(arguments) == 0
        last = last_lines(capsys.readouterr().out, 1)[0]
        assert last.startswith("nothing was learned: all 12 steps were skipped (non-finite loss")
        assert "from step 1: " in last


FAILING = ("stability=lower_lr", "stability.lower_lr.factor=1e30", "guard.max_consecutive=null")


def test_a_collapsed_run_names_its_incident_page_and_command_and_shows_no_text(tiny, capsys):
    folder = train(tiny, *FAILING)
    shown = capsys.readouterr().out
    found = record(folder)
    assert found["outcome"] == "collapsed"
    lines = last_lines(shown, 4)
    assert lines[0] == f"first incident: {found['incident']['line']}"
    page = lines[1].removeprefix("its page: ")
    assert Path(page).is_file()
    assert lines[2].startswith("to rerun it: python -m src.replay incident=")
    assert lines[3] == verdict(found)
    assert found["incident"]["cause"] in lines[3]
    assert WRITEUP[0] not in shown
    assert "more samples" not in shown
    typed = shlex.split(lines[2].removeprefix("to rerun it: "))
    assert replay.main(typed[3:]) == 0
    assert "reproduced" in capsys.readouterr().out


def test_the_command_of_an_incident_can_be_typed_where_its_folder_has_a_blank(tiny, capsys):
    assert main([*tiny, *FAILING, "paths.runs='my runs'"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("to rerun it")]
    typed = shlex.split(line.removeprefix("to rerun it: "))
    assert replay.main(typed[3:]) == 0


def test_a_clean_run_shows_its_text_and_nothing_of_incidents(tiny, capsys):
    train(tiny)
    shown = capsys.readouterr().out
    assert "more samples" in shown
    assert "incident" not in shown
    assert "non-finite" not in shown
    assert last_lines(shown, 1)[0].startswith("run folder: ")
