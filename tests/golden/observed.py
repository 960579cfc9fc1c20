"""What a command line means: its hash, folder and MLflow parameters, its sweep, or its error.

`python -m tests.golden.observed` writes command_lines.json again for the lines that it holds.
"""

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from src.cli import command_line
from src.config.run_config import RunConfig
from src.sweep.plan import Plan, make_plan
from src.tracking.labels import run_params

FILE = Path(__file__).with_name("command_lines.json")

OWN_MODEL = """
from torch import nn


def build(vocab_size, width=8):
    return nn.Sequential(nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size))
"""


@contextlib.contextmanager
def a_folder_with_files() -> Iterator[None]:
    """A working directory with what some of the lines name."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        Path("text.txt").write_text("To be, or not to be, that is the question:\n" * 400)
        Path("short.txt").write_text("hello world\n")
        Path("binary.dat").write_bytes(bytes(range(256)) * 9)
        Path("latin.txt").write_bytes(b"caf\xe9 noir\n" * 100)
        Path("own_model.py").write_text(OWN_MODEL)
        np.arange(3000, dtype=np.uint16).tofile("ids.bin")
        try:
            yield
        finally:
            sys.path.remove(folder)
            sys.modules.pop("own_model", None)
            os.chdir(before)


def observe(line: str) -> dict[str, Any]:
    """What the laboratory makes of `python -m src.train <line>`, without training.

    Returns:
        `error`, or `hash`, `folder` and `params` of a run, or `runs` of a sweep: hash by folder.
    """
    seen: list[RunConfig | Plan] = []
    errors = io.StringIO()

    def keep_run(config: RunConfig) -> int:
        config.config_hash()
        seen.append(config)
        return 0

    def keep_plan(name: str, arguments: Any) -> int:
        plan = make_plan(name, arguments)
        seen.append(plan)
        return 0

    with contextlib.redirect_stderr(errors):
        code = command_line.main(
            "train", keep_run, usage="", sweep=keep_plan, argv=shlex.split(line)
        )
    if not seen:
        assert code == 2, line
        return {"error": errors.getvalue().strip()}
    (found,) = seen
    if isinstance(found, Plan):
        return {"runs": {str(c.folder): c.config.config_hash() for c in found.cells}}
    return {
        "hash": found.config_hash(),
        "folder": str(found.folder),
        "params": run_params(found.plain()),
    }


def differing(params: dict[str, str], usual: dict[str, str]) -> dict[str, str | None]:
    """The parameters that are not those of the run without arguments; None: it has no such one."""
    names = sorted({*params, *usual})
    return {n: params.get(n) for n in names if params.get(n) != usual.get(n)}


def main() -> None:
    """Writes the file again."""
    lines = list(json.loads(FILE.read_text()))
    with a_folder_with_files():
        usual = observe("")["params"]
        found = {line: observe(line) for line in lines}
    for line, result in found.items():
        if line and "params" in result:
            result["params"] = differing(result["params"], usual)
    text = ",\n".join(f"{json.dumps(line)}: {json.dumps(r)}" for line, r in found.items())
    FILE.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
