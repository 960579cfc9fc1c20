"""The line at the end of a watched training, about steps that were not finite."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from nonfinite import Watch, closing_line, watch
from tests.runs import ROOT


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    closing_line.forget()


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) / x.norm(dim=1, keepdim=True)


def trained(bad: set[int], said: list[str], *, num_steps: int = 6, **options) -> Watch:
    model = Divides()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = watch(model, optimizer, say=said.append, **options)
    for step in range(1, num_steps + 1):
        x = torch.ones(2, 4)
        x[0] = 0.0 if step in bad else 1.0
        optimizer.zero_grad()
        model(x).mean().backward()
        try:
            optimizer.step()
        except FloatingPointError:
            assert options["on_nonfinite"] == "raise"
    return handle


LINES = {
    "skip": "2 of 6 steps were not finite and were skipped, the first at step 3",
    "raise": "2 of 6 steps were not finite and were not applied, the first at step 3",
    "stop": "2 of 6 steps were not finite and were skipped, the first at step 3;"
    " 2 finite steps after it were skipped as well",
}


@pytest.mark.parametrize("on_nonfinite", LINES)
def test_it_counts_the_steps_and_says_what_became_of_them(on_nonfinite):
    said: list[str] = []
    with trained({3, 5}, said, on_nonfinite=on_nonfinite) as handle:
        assert not any("of 6 steps" in line for line in said)
    assert said[-1] == LINES[on_nonfinite]
    handle.close()
    closing_line._say_all()
    assert sum("of 6 steps" in line for line in said) == 1


def test_applied_steps_are_called_so():
    said: list[str] = []
    trained({6}, said, on_nonfinite="warn").close()
    assert said[-1] == "1 of 6 steps was not finite and was applied: step 6"


def test_sound_steps_get_no_line():
    said: list[str] = []
    trained(set(), said).close()
    closing_line._say_all()
    assert said == []


def test_the_end_of_the_process_says_it_once(capsys):
    said: list[str] = []
    handle = trained({2}, said)
    closing_line._say_all()
    closing_line._say_all()
    handle.close()
    assert said[-1] == "1 of 6 steps was not finite and was skipped: step 2"
    assert sum("of 6 steps" in line for line in said) == 1


def test_it_keeps_no_model_alive(capsys):
    handle = trained({2}, [])
    model = weakref.ref(handle.model)
    del handle
    gc.collect()
    assert model() is None


def test_a_training_that_has_gone_is_counted_at_the_end_of_the_process(capsys):
    handle = trained({2}, [])
    handle.say = closing_line.to_stderr
    del handle
    gc.collect()
    assert capsys.readouterr().err == ""
    closing_line._say_all()
    assert capsys.readouterr().err == "1 of 6 steps was not finite and was skipped: step 2\n"


def test_a_process_that_ends_says_it(tmp_path):
    (tmp_path / "train.py").write_text(
        "from tests.nonfinite.test_closing_line import trained\n"
        "import sys\n"
        "handle = trained({2, 3}, [])\n"
        "handle.say = lambda line: print(line, file=sys.stderr)\n"
    )
    paths = [str(ROOT), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "train.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.stderr == "2 of 6 steps were not finite and were skipped, the first at step 2\n"
