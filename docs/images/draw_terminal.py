"""Draws docs/images/terminal.svg from a real run: `python docs/images/draw_terminal.py`."""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODULE = "src.examples.plain_loop"
WIDTH = 94


def draw() -> str:
    """The picture of what the example prints."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            cwd=folder,
            env={"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
    said = done.stdout.replace(f"{ROOT}/", "").splitlines()
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ python -m {MODULE}", style="bold"))
    # The process's two streams need not arrive in the order in which they were written.
    last = ("step 100", "1 of 100")
    for line in sorted(said, key=lambda line: line.startswith(last) + line.startswith(last[1])):
        name, colon, rest = line.partition(": ")
        is_labelled = bool(colon) and line.startswith(("  cause", "  what", "  next", "step"))
        style = "bold red" if line.startswith("step 51") else "bold cyan"
        text = Text.assemble((name + colon, style), rest) if is_labelled else Text(line)
        console.print(text)
    title = "a training loop whose 51st batch holds an empty row"
    svg = console.export_svg(title=title, unique_id="terminal")
    # The picture loads nothing: fonts are those of the reader.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    (HERE / "terminal.svg").write_text(draw(), encoding="utf-8")
