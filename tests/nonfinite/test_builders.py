"""The command below an incident can be typed, and `python -m nonfinite` answers what is typed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nonfinite.__main__ import main
from nonfinite.builders import PLACEHOLDER, name_of
from tests.forked import python
from tests.runs import ROOT

NET = """
import torch
from torch import nn
from nonfinite import watch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) / x.norm(dim=1, keepdim=True)


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)


class Narrow(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)


def build():
    return Net()


def fails():
    raise RuntimeError


NUMBER = 3
"""

LOOP = """
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch(model, optimizer)
    for step in range(1, 7):
        x = torch.randn(8, 4)
        x[3] = 0 if step >= 4 else 1
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
    print("trained")
"""

GUARDED = f'{NET}\nif __name__ == "__main__":{LOOP}'
UNGUARDED = f"{NET}\nif True:{LOOP}"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What a Python of its own makes of it."""
    paths = [str(ROOT), *(path for path in sys.path if path)]
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def next_of(said: str) -> list[str]:
    (line,) = [line for line in said.splitlines() if line.startswith("  next: ")]
    return shlex.split(line.removeprefix("  next: "))


@pytest.mark.parametrize(
    ("file", "name", "run"),
    [
        ("train.py", "train:Net", started),
        ("train-net.py", "train-net:Net", python),
        ("in/some.py", "in.some:Net", python),
    ],
)
def test_the_command_that_is_printed_runs_the_step_again(file, name, run):
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(GUARDED)
    words = next_of(run(file).stderr)
    assert words[-1] == name
    again = run(*words[1:])
    assert again.stdout.splitlines()[-1] == "reproduced, bitwise", again.stderr
    assert "trained" not in again.stdout + again.stderr


@pytest.mark.parametrize(
    "model", ["nn.Sequential(Net())", "type('Local', (Net,), {})()", "Wider(4)"], ids=str
)
def test_where_no_name_is_known_the_command_says_what_to_put_there(model):
    code = GUARDED.replace("model = Net()", f"model = {model}")
    wider = "class Wider(Net):\n    def __init__(self, x):\n        super().__init__()\n\n\n"
    Path("train.py").write_text(code.replace("def build", f"{wider}def build", 1))
    said = python("train.py").stderr
    words = next_of(said)
    assert words[-1] == PLACEHOLDER
    assert "stands for a function of yours that takes no arguments and returns the model" in said
    page = Path("incidents/step-4/incident.html").read_text()
    assert PLACEHOLDER in page and "stands for a function of yours" in page
    # A shell takes the line as it stands.
    line = shlex.join(words[1:])
    assert subprocess.run(["bash", "-n", "-c", f"python {line}"], check=True).returncode == 0
    assert "stands for a function of yours" in python(*words[1:]).stderr


def test_a_module_beside_a_script_elsewhere_is_named_by_its_folder():
    Path("deep").mkdir()
    Path("deep", "net.py").write_text(NET)
    Path("deep", "train.py").write_text(f"from net import *\nimport net\nif True:{LOOP}")
    assert next_of(python("deep/train.py").stderr)[-1] == "deep.net:Net"


def test_a_class_of_an_installed_module_is_named_by_it():
    assert name_of(nn.Transformer(8, 2, 1, 1, 8)) == "torch.nn.modules.transformer:Transformer"
    assert name_of(nn.Sequential(nn.Linear(2, 2))) is None
    assert name_of(nn.Linear(2, 2)) is None


def test_a_script_without_a_guard_leaves_its_incident_and_says_why_it_trains():
    Path("train.py").write_text(UNGUARDED)
    python("train.py")
    folder = Path("incidents/step-4")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    again = python("-m", "nonfinite", str(folder), "--model", "train:Net")
    assert again.returncode == 0, again.stderr
    # The user's own prints do not stand in the answer.
    assert again.stdout.startswith("the top-level module: ")
    assert again.stdout.splitlines()[-1] == "reproduced, bitwise"
    notes, trained = again.stderr.splitlines()
    assert notes.startswith("note: train: its training code runs again, because it has no")
    assert 'if __name__ == "__main__": guard' in notes and trained == "trained"
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    assert after == before and os.listdir("incidents") == ["step-4"]


@pytest.mark.parametrize("on_nonfinite", ["raise", "stop"])
def test_a_script_without_a_guard_is_imported_whatever_it_does_at_a_failure(on_nonfinite):
    Path("train.py").write_text(
        UNGUARDED.replace(
            "optimizer)\n    for", f"optimizer, on_nonfinite={on_nonfinite!r})\n    for"
        )
    )
    python("train.py")
    again = python("-m", "nonfinite", "incidents/step-4", "--model", "train:Net")
    assert again.stdout.splitlines()[-1] == "reproduced, bitwise", again.stderr


ANSWERS = {
    "net.py:Net": "must be package.module:callable; type net:Net",
    "./in/net.py:Net": "type in.net:Net",
    "/some/where/net.py:Net": "type net:Net in the folder /some/where",
    "net": "must be package.module:callable, such as train:Net",
    "net.Net": "a colon stands before the name, as in net:Net",
    "net:Nett": "net has no attribute 'Nett'; did you mean net:Net?",
    "nett:Net": "did you mean net:Net?",
    "other:Net": "No module named 'other' in {here} or among the installed packages;"
    " run the command in the folder of other.py",
    "net:Wide": "needs width; name a function without arguments that returns the model, such as"
    " net:build",
    "net:Narrow": "the weights of the incident do not fit (",
    "net:NUMBER": "is a int; must be callable",
    "net:fails": "RuntimeError",
    "net:list": "returned a list; must return the model",
    "quits_at_once:Net": "SystemExit: 3",
}


@pytest.fixture
def incident():
    Path("train.py").write_text(GUARDED)
    python("train.py")
    return Path("incidents/step-4")


def test_what_cannot_be_built_is_answered_with_what_to_type(incident, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("net.py").write_text(f"{NET}\nlist = list\n")
    Path("quits_at_once.py").write_text("import sys\n\nsys.exit(3)\n")
    for name, line in ANSWERS.items():
        with pytest.raises(SystemExit) as ended:
            main([str(incident), "--model", name])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert f"--model={name}: " in error and line.format(here=Path.cwd()) in error, name
        assert error.startswith("error: ") and error.count("\n") == 1
    sys.modules.pop("net")


def test_a_command_without_its_folder_is_told_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model", "train:Net"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the following arguments are required: folder\n"


def test_a_folder_of_incidents_is_answered_with_those_in_it(incident, capsys):
    with pytest.raises(SystemExit):
        main(["incidents", "--model", "train:Net"])
    assert "incidents: holds no state.pt; it has incidents/step-4" in capsys.readouterr().err


def test_the_rerun_of_a_failed_loss_agrees_with_its_incident(capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    from nonfinite import watch

    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = watch(model, optimizer)
    (model(torch.ones(2, 4)) * 0).log().mean().backward()
    optimizer.step()
    (incident,) = handle.incidents
    Path("lossy.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Linear(4, 4)\n"
    )
    capsys.readouterr()
    assert main(["incidents/step-1", "--model", "lossy:build"]) == 0
    first, cause, last = capsys.readouterr().out.splitlines()
    assert first.startswith("the gradient that the loss sent to the model's output is not finite")
    assert first.startswith(incident["line"].removeprefix("step 1: "))
    assert cause == f"cause: {incident['cause']}. {incident['explanation']}"
    assert "outputs are finite" in cause and last == "reproduced, bitwise"
