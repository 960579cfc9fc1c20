"""A run is named before PyTorch is imported as it is afterwards."""

import json
import os
import subprocess
import sys

from tests.golden.observed import FILE, a_folder_with_files
from tests.runs import ROOT

RUNS = {
    line: seen["folder"] for line, seen in json.loads(FILE.read_text()).items() if "folder" in seen
}

PROGRAM = """
import json, shlex, sys
from src.config.name_before_torch import name_before_torch
named = [str(name_before_torch("train", shlex.split(line)).folder) for line in json.load(sys.stdin)]
print(json.dumps([named, "torch" in sys.modules]))
"""


def test_the_folder_is_that_of_the_checked_run():
    """In a process of its own, because the schema changes how a configuration is composed."""
    external = [line for line in RUNS if "model=external" in line]
    lines = list(dict.fromkeys([*external, *list(RUNS)[::4]]))
    assert external
    assert len(lines) >= 40
    with a_folder_with_files():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps(lines),
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr
    folders, has_torch = json.loads(done.stdout)
    assert dict(zip(lines, folders, strict=True)) == {line: RUNS[line] for line in lines}
    assert not has_torch
