"""Code that a forged file names is neither called nor imported."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from src import convert, diagnose, generate, replay, report, sync, train
from tests.conftest import PACE, TINY
from tests.nonfinite.test_recorder import FAILING
from tests.runs import lab
from tests.runs import train as trained

CODE = "leaves:build"
LEAVES = """
from pathlib import Path
Path("left-by-the-import").touch()
def build(**kwargs):
    Path("left-by-the-call").touch()
"""
TAG = "!!python/object/apply:leaves.build"
STEP = 4


class Pickled:
    """Leaves a file behind where a pickle of it is read as pickles are."""

    def __reduce__(self):
        return (Path.touch, (Path("left-by-the-pickle"),))


@pytest.fixture(scope="module")
def good(tmp_path_factory, shared_cache) -> Path:
    """A folder in which one run of a study has failed and saved its state."""
    place = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        arguments = [*TINY, f"paths.cache={shared_cache}", *FAILING]
        folder = trained(arguments, "study=good", f"save_at=[{STEP}]")
        folder.rename("run")
        next(Path("run", "incidents").glob("step-*")).rename("run/incidents/incident")
        shutil.copytree("run", place / "runs" / "good" / "mlha+moe+none" / "seed-0")
    return place


@pytest.fixture
def here(good, tmp_path, monkeypatch, shared_cache) -> Path:
    """A copy to be forged, beside a module that tells when it is imported or called."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    (tmp_path / "leaves.py").write_text(LEAVES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "leaves", raising=False)
    monkeypatch.setenv("SECRET", "hunter2")
    return tmp_path


def rewritten(file: str, change: Callable[[dict], object]) -> None:
    """Changes a YAML file or a file of tensors."""
    path = Path(file)
    if path.suffix == ".yaml":
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content))
    else:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)


def external(config: dict) -> None:
    """Makes a configuration that of a model that is not ours."""
    config["kinds"] = {"attention": "external", "ffn": "external"}
    config["choices"] |= {"attention": "external", "ffn": "external", "model": "external"}
    config["model"] = {"target": CODE, "kwargs": {}}


def arguments(*more: str) -> Callable[[dict], object]:
    return lambda config: config.update(arguments=[*PACE, *more])


def tagged(file: str) -> None:
    with Path(file).open("a") as out:
        out.write(f"forged: {TAG} []\n")


def pickled(file: str) -> None:
    rewritten(file, lambda saved: saved.update(forged=Pickled()))


def in_book(file: str, content: dict) -> None:
    folder = Path("book", "good")
    folder.mkdir(parents=True)
    (folder / file).write_text(yaml.safe_dump(content))


CONFIG = "run/config.yaml"
LAST = "run/checkpoints/last.ckpt"
INCIDENT = "run/incidents/incident/state.pt"
FORK = [f"fork=run@{STEP}", "study=other", "tracking=local"]
NAMED = ["model=external", f"model.target={CODE}"]
MAPPED = ["model=external", f"model={{target:'{CODE}'}}", "attention=external", "ffn=external"]

FORGED: dict[str, tuple[Callable[[], object], Callable, list[str], str]] = {
    "fork, by its arguments": (
        lambda: rewritten(CONFIG, arguments(*NAMED)),
        train.main,
        FORK,
        f"config.yaml holds model.target={CODE}; code that a file names is never run",
    ),
    "fork, by an argument that is forced": (
        lambda: rewritten(CONFIG, arguments("model=external", f"++model.target={CODE}")),
        train.main,
        FORK,
        "a file may only set field=value",
    ),
    "fork, by another folder of configuration": (
        lambda: rewritten(CONFIG, arguments("hydra.searchpath=[file:///tmp]")),
        train.main,
        FORK,
        "a file may only set field=value",
    ),
    "fork, by a group that is a mapping": (
        lambda: rewritten(CONFIG, arguments(f"model={{target:'{CODE}'}}")),
        train.main,
        FORK,
        "must be the name of an option",
    ),
    "fork, by a mapping that goes into an external model": (
        lambda: rewritten(CONFIG, arguments(*MAPPED)),
        train.main,
        FORK,
        "must be the name of an option",
    ),
    "fork, by a group outside of conf/": (
        lambda: rewritten(CONFIG, arguments("preset=../../tmp/forged")),
        train.main,
        FORK,
        "unknown option",
    ),
    "fork, which looks into the environment": (
        lambda: rewritten(CONFIG, arguments("data.path='${oc.env:SECRET}'")),
        train.main,
        FORK,
        "values in a file may not refer to others; type data.path=<value>",
    ),
    "fork, by a list of no arguments": (
        lambda: rewritten(CONFIG, lambda config: config.update(arguments=[{"_target_": CODE}])),
        train.main,
        FORK,
        "must be a list of field=value",
    ),
    "fork, by a tag of YAML": (lambda: tagged(CONFIG), train.main, FORK, "is damaged"),
    "fork, by a pickle": (
        lambda: pickled(f"run/checkpoints/state-{STEP}.ckpt"),
        train.main,
        FORK,
        "cannot be read without running code",
    ),
    "init, by its configuration": (
        lambda: rewritten(LAST, lambda saved: external(saved["config"])),
        train.main,
        ["init=run", "tracking=local"],
        "has an external model",
    ),
    "init, by its kinds": (
        lambda: rewritten(
            LAST,
            lambda saved: (
                external(saved["config"]),
                saved["config"]["choices"].update(model="proxy"),
            ),
        ),
        train.main,
        ["init=run", "tracking=local"],
        "needs model=external",
    ),
    "init, by an option outside of conf/": (
        lambda: rewritten(
            LAST, lambda saved: saved["config"]["choices"].update(attention="../../tmp/forged")
        ),
        train.main,
        ["init=run", "tracking=local", "attention=mlha", "ffn=mlp"],
        "init=run",
    ),
    "init, by a pickle": (
        lambda: pickled(LAST),
        train.main,
        ["init=run", "tracking=local"],
        "cannot be read without running code",
    ),
    "resume, by a pickle": (
        lambda: pickled(LAST),
        train.main,
        ["tracking=local", f"resume={LAST}"],
        "cannot be read without running code",
    ),
    "replay, by the incident's configuration": (
        lambda: rewritten(INCIDENT, lambda saved: external(saved["config"])),
        replay.main,
        ["incident=run/incidents/incident"],
        "its model is external",
    ),
    "replay, by a pickle": (
        lambda: pickled(INCIDENT),
        replay.main,
        ["incident=run/incidents/incident"],
        "cannot be read without running code",
    ),
    "diagnose, by the configuration": (
        lambda: rewritten(LAST, lambda saved: external(saved["config"])),
        diagnose.main,
        ["checkpoint=run"],
        "has no built-in model",
    ),
    "diagnose, by the arguments": (
        lambda: rewritten(LAST, lambda saved: arguments(*NAMED)(saved["config"])),
        diagnose.main,
        ["checkpoint=run"],
        "code that a file names is never run",
    ),
    "diagnose, by a mapping among the arguments": (
        lambda: rewritten(LAST, lambda saved: arguments(*MAPPED)(saved["config"])),
        diagnose.main,
        ["checkpoint=run"],
        "must be the name of an option",
    ),
    "diagnose, by a fork among the arguments": (
        lambda: (
            rewritten(CONFIG, arguments(*NAMED)),
            rewritten(LAST, lambda saved: arguments(f"fork=run@{STEP}")(saved["config"])),
        ),
        diagnose.main,
        ["checkpoint=run"],
        "code that a file names is never run",
    ),
    "diagnose, by a batch": (
        lambda: torch.save(Pickled(), "batch.pt"),
        diagnose.main,
        ["checkpoint=run", "batch=batch.pt"],
        "is damaged",
    ),
    "convert, by the configuration": (
        lambda: rewritten(LAST, lambda saved: external(saved["config"])),
        convert.main,
        ["source=run", "out=out"],
        "has an external model",
    ),
    "convert, by a pickle": (
        lambda: pickled(LAST),
        convert.main,
        ["source=run", "out=out"],
        "cannot be read without running code",
    ),
    "generate, by the configuration": (
        lambda: rewritten(LAST, lambda saved: external(saved["config"])),
        generate.main,
        ["run=run"],
        "has an external model",
    ),
    "report, by a tag of YAML": (
        lambda: tagged("runs/good/mlha+moe+none/seed-0/config.yaml"),
        report.main,
        ["study=good"],
        "is damaged",
    ),
    "reproduce, by a study of another book": (
        lambda: in_book("study.yaml", {"sweeps": [NAMED], "short": []}),
        lab("reproduce"),
        ["paths.book=book", "plan=true"],
        "code that a file names is never run",
    ),
    "reproduce, by a mapping in a study of another book": (
        lambda: in_book("study.yaml", {"sweeps": [MAPPED], "short": []}),
        lab("reproduce"),
        ["paths.book=book", "plan=true"],
        "must be the name of an option",
    ),
    "reproduce, by a launcher's shell commands": (
        lambda: in_book(
            "study.yaml",
            {
                "sweeps": [["hydra/launcher=slurm", "+hydra.launcher.setup=['touch left']"]],
                "short": [],
            },
        ),
        lab("reproduce"),
        ["paths.book=book", "plan=true"],
        "a file may only set field=value",
    ),
    "book, by a run of another book": (
        lambda: in_book("run.yaml", {"arguments": [*NAMED, "study=good"]}),
        lab("book"),
        ["paths.book=book", "studies=good"],
        "code that a file names is never run",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_code_that_a_file_names_is_refused_in_one_line_and_never_run(case, here, capsys):
    forge, command, typed, said = FORGED[case]
    forge()
    capsys.readouterr()
    assert command(typed) == 2
    line = capsys.readouterr().err
    assert (line.count("error: "), line.count("\n")) == (1, 1), line
    assert said in line
    assert "hunter2" not in line
    assert "leaves" not in sys.modules
    assert not list(here.rglob("left*"))


def test_sync_reads_no_tag_of_yaml_either(here, capsys):
    tagged("runs/good/mlha+moe+none/seed-0/config.yaml")
    assert sync.main([]) != 0
    assert not list(here.rglob("left*"))


def test_what_these_files_name_does_leave_a_trace_when_it_is_run(here):
    """So that the tests above can fail."""
    __import__("leaves").build()
    torch.save(Pickled(), "pickle.pt")
    torch.load("pickle.pt", weights_only=False)
    assert {f"left-by-the-{how}" for how in ("import", "call", "pickle")} <= set(os.listdir())


def test_a_fork_runs_the_target_that_is_typed(here, capsys):
    rewritten(CONFIG, arguments(*NAMED))
    assert train.main([*FORK, f"model.target={CODE}"]) == 2
    assert "returned a NoneType; must return an nn.Module" in capsys.readouterr().err
    assert Path("left-by-the-call").exists()
