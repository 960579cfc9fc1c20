"""The library by itself: its wheel, in an environment that has torch and what torch needs."""

import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from tests.runs import ROOT

PAGE = (ROOT / "src" / "nonfinite" / "README.md").read_text()
*_, SMALLEST = re.findall(r"```python\n(.*?)```", PAGE, re.S)
BEFORE = """
import torch
from torch import nn
from torch.nn import functional as F
from nonfinite import watch

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        return self.layer(x / x.norm())

torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters())
batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(6)]
batches[2][0].zero_()
"""
AFTER = """
import sys
print([bool(p.isfinite().all()) for p in model.parameters()])
foreign = {"lightning", "numpy", "transformers", "altair", "src"} & set(sys.modules)
print("loaded", sorted(foreign))
"""


def needed_by(name: str, seen: set[str]) -> set[str]:
    """A distribution and all that it requires without extras."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in seen:
        return seen
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return seen
    seen.add(name)
    for line in found.requires or []:
        if ";" not in line or "extra ==" not in line:
            needed_by(re.split(r"[ ;<>=!~\[(]", line)[0], seen)
    return seen


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_with_torch_alone(tmp_path):
    # A copy, because building leaves files beside the sources.
    sources = shutil.copytree(ROOT / "src" / "nonfinite", tmp_path / "sources")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, sources], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("nonfinite-*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = (tmp_path / "empty" / "lib").glob("python*/site-packages")
    for name in needed_by("torch", set()) - {"setuptools", "pip"}:
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top != ".." and not (packages / top).exists():
                (packages / top).symlink_to(Path(distribution(name).locate_file(top)))
    (tmp_path / "loop.py").write_text(BEFORE + SMALLEST + AFTER)
    done = subprocess.run(
        [python, "loop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[True, True]", "loaded []"]
    assert "step 3: the top-level module: torch.Tensor.div (forward)" in done.stderr
    assert "cause: division by zero" in done.stderr
    assert "x / x.norm()" in done.stderr
    assert (tmp_path / "incidents" / "step-3" / "incident.html").is_file()


def test_the_smallest_loop_of_the_page_has_five_lines():
    assert len(SMALLEST.splitlines()) == 5
