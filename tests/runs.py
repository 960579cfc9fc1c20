"""Running the command in tests, and reading what it left."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from src.common.run_folder import read_metrics
from src.lab.__main__ import main as lab_main
from src.train import main
from src.training.stop_on_signal import Interrupt

ROOT = Path(__file__).parent.parent
TIMES = ("speed/",)


def train(arguments: Sequence[str], *more: str) -> Path:
    """Runs the command in this process and returns the run folder; it must end well."""
    before = set(Path("runs").rglob("record.json"))
    assert main([*arguments, *more]) == 0
    (record,) = set(Path("runs").rglob("record.json")) - before
    return record.parent


_SHELF = tempfile.TemporaryDirectory(prefix="made-runs-")
_MADE: dict[tuple[str, ...], Path] = {}


def made(arguments: Sequence[str], *more: str) -> Path:
    """As `train`, for a run that a test only begins with: trained once a worker, then copied.

    Not where the test has changed what a run does, nor where its arguments mean another thing in
    another folder.
    """
    key = (*arguments, *more)
    if key not in _MADE:
        folder = train(arguments, *more)
        kept = Path(_SHELF.name, str(len(_MADE)))
        shutil.copytree(folder, kept / folder)
        _MADE[key] = folder
        return folder
    folder = _MADE[key]
    shutil.copytree(Path(_SHELF.name, str(list(_MADE).index(key)), folder), folder)
    return folder


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def metrics(folder: Path) -> list[dict[str, float]]:
    """The logged lines without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMES)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def last_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return last_checkpoint(folder)["state_dict"]


def assert_same_tree(one: Any, two: Any, where: str = "") -> None:
    """Bitwise equality of nested containers."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same_tree(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_same_tree(*pair, f"{where}/{index}")
    else:
        assert one == two, where


def stop_after(patch, step: int) -> None:
    """Has this process terminated in the given step, as a scheduler would do it."""
    original = Interrupt.on_step_end

    def on_step_end(self, trainer, pl_module, done):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        original(self, trainer, pl_module, done)

    patch.setattr(Interrupt, "on_step_end", on_step_end)


def start(command: str, arguments: Sequence[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Starts a command as a user would, in another folder."""
    return subprocess.Popen(
        [sys.executable, "-m", f"src.{command}", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in a shell's background ignores Ctrl-C, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def free_port() -> int:
    """Of this machine, as of now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def in_a_child(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives, in a process that is forked for it: its memory goes with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), os.fdopen(writer, "wb") as out:
            # No thread has come along.
            torch.set_num_threads(1)
            out.write(pickle.dumps(function(*args, **kwargs)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        content = answer.read()
    os.waitpid(child, 0)
    assert content, f"{function} has raised"
    return pickle.loads(content)


UNTIMED = ("train_seconds", "first_step_seconds", "wall_seconds")


def comparable(checkpoint):
    """A checkpoint without what depends on the clock or on the folder."""
    callbacks = {
        name: {k: v for k, v in state.items() if k not in UNTIMED}
        if isinstance(state, dict)
        else state
        for name, state in checkpoint["callbacks"].items()
    }
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "rng", "config_hash")
    return {name: checkpoint[name] for name in names} | {"callbacks": callbacks}


def assert_same_run(one, two):
    assert metrics(one) == metrics(two)
    assert_same_tree(comparable(last_checkpoint(one)), comparable(last_checkpoint(two)))
    left, right = record(one), record(two)
    for name in ("outcome", "steps", "guard", "spikes", "best"):
        assert left[name] == right[name], name


def lab(command: str) -> Callable[[Sequence[str]], int]:
    """A command of src.lab, to be called with its arguments."""
    return lambda arguments: lab_main([command, *arguments])
