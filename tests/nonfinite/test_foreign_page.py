"""The page on foreign training loops: its example runs, and it lists what there is."""

import json
import re
import subprocess
import sys

import pytest

import nonfinite
import nonfinite.lightning
import src.stability
from src.diagnose import main as diagnose
from tests.runs import ROOT

PAGE = (ROOT / "src" / "nonfinite" / "README.md").read_text()
TRAINER, EXAMPLE, SMALLEST = re.findall(r"```python\n(.*?)```", PAGE, re.S)

LATER = """
import sys
print("loaded", sorted({"hydra", "omegaconf", "mlflow", "src.model"} & set(sys.modules)))
"""


def run(code: str, folder) -> str:
    (folder / "main.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_as_it_stands_and_finds_what_goes_wrong(tmp_path, monkeypatch, capsys):
    said = run(EXAMPLE + LATER, tmp_path)
    assert "step 51: the top-level module: torch.Tensor.div (forward) produced 64 of 64" in said
    assert "'skipped_steps': 1" in said
    assert "loaded []" in said
    incident = json.loads((tmp_path / "incidents" / "step-51" / "incident.json").read_text())
    assert incident["module"] == ""
    assert incident["cause"] == "division by zero"
    assert incident["source"]["code"].startswith("x = x / (x - x)")
    (command,) = re.findall(r"`python -m (src.diagnose [^`]*)`", PAGE)
    (tmp_path / "your").mkdir()
    (tmp_path / "your" / "module.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name, *arguments = command.split(" ")
    assert name == "src.diagnose"
    assert diagnose(arguments) == 0
    out, err = capsys.readouterr()
    assert "the top-level module: torch.Tensor.div (forward)" in out
    assert "differs from the record" not in err
    again = json.loads((tmp_path / "incidents" / "step-51" / "incident.json").read_text())
    assert again == incident
    page = (tmp_path / "incidents" / "step-51" / "incident.html").read_text()
    assert "src.diagnose" in page and "src.replay" not in page


def test_importing_it_costs_neither_hydra_nor_mlflow_nor_our_model(tmp_path):
    said = run(f"import nonfinite\n{LATER}\nimport src.stability\n{LATER}", tmp_path)
    assert said.splitlines() == ["loaded []"] * 2


@pytest.mark.parametrize("module", [nonfinite, nonfinite.lightning, src.stability])
def test_the_page_lists_all_that_is_public(module):
    _, _, section = PAGE.partition(f"| from `{module.__name__}` | |\n")
    table = section.partition("\n\n")[0]
    # The first column alone; the second speaks of methods.
    listed = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert listed == set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
