import json
import math

import pytest

from src.common.errors import InputError
from src.common.run_folder import RunFolder, read_metrics
from src.run.metrics_writer import MetricsWriter


def test_a_line_a_step_with_finite_numbers_only(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", num_lines=0)
    writer.log_metrics({"a": 1.0, "bad": math.nan}, step=1)
    writer.log_metrics({"b": 2, "worse": math.inf}, step=1)
    writer.log_metrics({"a": 3.0}, step=2)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0, "b": 2.0}]
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1, "a": 1.0, "b": 2.0},
        {"step": 2, "a": 3.0},
    ]


def test_metrics_are_cut_to_a_step_and_a_torn_line_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1, "a": 1}\n{"step": 5, "a": 2}\n{"step": 9, "a"')
    folder.cut_metrics(step=4)
    assert folder.metrics.read_text() == '{"step": 1, "a": 1}\n'


def test_one_writer_at_a_time(tmp_path):
    one, two = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    one.open()
    with pytest.raises(InputError, match="being written by another run"):
        two.open()
    one.close()
    two.open()
    two.close()


def test_moving_aside_keeps_everything(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.move_aside() is None
    for content in ("one", "two"):
        folder.path.mkdir()
        (folder.path / "x").write_text(content)
        assert (folder.move_aside() / "x").read_text() == content
    assert not folder.path.exists()
