"""What the documentation tells a reader to write is complete."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import TINY
from tests.runs import ROOT


@pytest.mark.slow
def test_the_remedy_of_the_documentation_works_as_written(tmp_path):
    for folder in ("src", "conf"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    section = (ROOT / "docs" / "your_own_remedy.md").read_text()
    (code,) = re.findall(r"`(src/\S+\.py)`:\n\n```python\n(.*?)```", section, re.DOTALL)
    (options,) = re.findall(r"`(conf/\S+\.yaml)`:\n\n```yaml\n(.*?)```", section, re.DOTALL)
    for name, content in (code, options):
        (tmp_path / name).write_text(content)
    registry = tmp_path / "src" / "stability" / "__init__.py"
    (line,) = re.findall(r"the line `(.*?)` with its import", section)
    changed = registry.read_text().replace(
        "REMEDIES: dict", "from src.stability.centre import CentreConfig\n\nREMEDIES: dict", 1
    )
    registry.write_text(changed.replace("] = {\n", f"] = {{\n    {line}\n", 1))

    def train(*arguments):
        command = [sys.executable, "-m", "src.train", *TINY, "tracking=local", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = train("stability=[centre,ema]", "recipe.max_steps=6")
    assert done.returncode == 0, done.stderr
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    assert "stability/centre_mean_absmax" in metrics.read_text()
    wrong = train("stability=centre", "stability.centre.start_frac=2")
    assert wrong.returncode == 2
    assert "start_frac=2" in wrong.stderr
