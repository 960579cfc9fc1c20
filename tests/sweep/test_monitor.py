"""Each job of a sweep gets one line at its end."""

import json
from types import SimpleNamespace

from src.common import terminal
from src.sweep.monitor import Monitor
from tests.run.test_outcome import a_record


def test_a_job_that_was_not_clean_is_told_with_its_cause(tmp_path, capsys):
    cells = []
    records = {
        "clean": a_record(outcome="clean", incident=None),
        "broken": a_record(bad=range(3, 11), outcome="collapsed"),
    }
    for name, record in records.items():
        folder = tmp_path / name / "seed-0"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record))
        status = {"state": "finished", "reason": "", "started": 1.0, "ended": 6.0}
        (folder / "status.json").write_text(json.dumps(status))
        cells.append(SimpleNamespace(folder=folder, config=SimpleNamespace(variant_name=name)))
    board = terminal.JobBoard()
    board.total = len(cells)
    with Monitor(cells, lambda cell: cell.folder / "status.json", board=board, n_jobs=1):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] clean/seed-0: finished after 5 s",
        "[2/2] broken/seed-0: finished after 5 s"
        " (collapsed: 8 of 10 steps were not finite, the first at step 3: router underflow)",
    ]
