"""200 command lines keep their hashes, folders, MLflow parameters and error lines.

A line whose words get plainer changes here in the same commit: `python -m tests.golden.observed`
writes the file again, and the difference shows what changed.
"""

import json

import pytest

from tests.golden.observed import FILE, a_folder_with_files, differing, observe

GOLDEN = json.loads(FILE.read_text())
PARTS = 20
"""Tests among which the lines are shared, so that several workers take them."""


@pytest.mark.parametrize("part", range(PARTS))
def test_a_command_line_means_what_it_meant(part, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with a_folder_with_files():
        for line in list(GOLDEN)[part::PARTS]:
            found, golden = observe(line), GOLDEN[line]
            if line and "params" in found:
                found["params"] = differing(found["params"], GOLDEN[""]["params"])
            assert found == golden, line


def test_there_are_two_hundred_of_them():
    assert len(GOLDEN) >= 200
