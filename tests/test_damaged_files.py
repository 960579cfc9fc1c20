"""A damaged file in a run folder: one line that names it, and never a traceback."""

import shutil
from pathlib import Path

import pytest

from src import report, sync, train
from src.common.errors import DamagedError
from src.common.run_folder import read_json, read_metrics
from src.study.read.collect import collect
from tests import runs
from tests.conftest import TINY
from tests.runs import metrics, record
from tests.study import synthetic
from tests.study.synthetic import Arm

DAMAGES = {
    "not UTF-8": lambda content: content[: len(content) // 2] + b"\xff" + content[-9:],
    "cut in half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a list": lambda content: b"[1]\n",
    "zeros": lambda content: bytes(len(content)) + b"\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_cache):
    """A finished run with a state for branches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        return runs.train([*TINY, f"paths.cache={shared_cache}", "save_at=[8]"]).resolve()


@pytest.fixture
def copied(folder, tmp_path, monkeypatch, shared_cache):
    """A copy of its own, and the arguments that made it."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / folder.relative_to(folder.parents[3])
    shutil.copytree(folder, own)
    return own, [*TINY, f"paths.cache={shared_cache}", "save_at=[8]"]


def said(capsys, command, arguments, *, code: int) -> str:
    """The one line of an error, or what was said beside it."""
    capsys.readouterr()
    assert command.main([*arguments]) == code
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    if code == 2:
        assert found.err.startswith("error: ")
        assert found.err.count("\n") == 1
    return found.err + found.out


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.yaml", "record.json", "metrics.jsonl"])
def test_training_names_the_file(name, damage, copied, capsys):
    run, arguments = copied
    if name == "metrics.jsonl":
        (run / "record.json").unlink()
    file = run / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    if (name, damage) == ("metrics.jsonl", "cut in half"):
        assert "the run wrote are missing" in said(capsys, train, arguments, code=0)
    else:
        assert f"{run.name}/{name}: " in said(capsys, train, arguments, code=2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_text_that_only_people_read_stops_nothing(damage, copied, capsys):
    run, arguments = copied
    for name in ("samples.md", "train.log", "checkpoints/state-8.key"):
        (run / name).write_bytes(DAMAGES[damage]((run / name).read_bytes()))
    assert "is already finished" in said(capsys, train, arguments, code=0)
    assert "report: " in said(capsys, report, ["study=single"], code=0)


@pytest.mark.parametrize("damage", ["not UTF-8", "cut in half", "a list"])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_branch_names_the_file_of_its_source(name, damage, copied, capsys):
    run, arguments = copied
    file = run / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    if (name, damage) == ("metrics.jsonl", "cut in half"):
        return
    fork = [*arguments, "study=other", f"fork={run}@8"]
    assert f"{run.name}/{name}: is damaged" in said(capsys, train, fork, code=2)
    assert not Path("runs/other").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_report_is_made_of_the_other_runs_and_names_the_damaged_one(
    damage, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    study = synthetic.study(tmp_path, {"none": Arm(), "clip03": Arm()}, seeds=3)
    for name in ("config.yaml", "record.json", "metrics.jsonl"):
        file = study.runs[1].folder / name
        kept = file.read_bytes()
        file.write_bytes(DAMAGES[damage](kept))
        (study.runs[2].folder / "samples.md").write_bytes(b"\xff")
        text = said(capsys, report, ["study=synthetic"], code=0)
        # Markdown escapes the underscores.
        page = Path("runs/synthetic/report/report.md").read_text().replace("\\", "")
        # A log that ends too early is told by the record of a run, and a synthetic one keeps none.
        if name != "metrics.jsonl" or damage in ("not UTF-8", "a list", "zeros"):
            left_out = f"{study.runs[1].name}: left out:"
            assert left_out in " ".join(text.split())
            assert left_out in page
        file.write_bytes(kept)
    assert "left out" not in said(capsys, report, ["study=synthetic"], code=0)


def test_where_all_runs_are_damaged_one_is_named(tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm()}, seeds=2)
    for run in study.runs:
        (run.folder / "record.json").write_text("{")
    with pytest.raises(
        DamagedError, match=r"none of its runs can be read; .*record.json: is damaged"
    ):
        collect(tmp_path / "runs", "synthetic")


@pytest.mark.parametrize("damage", DAMAGES)
def test_sync_names_the_file_and_goes_on(damage, copied, tmp_path, capsys):
    run, _ = copied
    for name in ("config.yaml", "record.json", "metrics.jsonl"):
        kept = (run / name).read_bytes()
        (run / name).write_bytes(DAMAGES[damage](kept))
        said(capsys, sync, ["tracking.uri=null"], code=1 if name == "config.yaml" else 0)
        (run / name).write_bytes(kept)
    (run / "mlflow.json").write_bytes(DAMAGES[damage](b'{"uri": "sqlite:///x.db"}'))
    assert "mlflow.json: is damaged" in said(capsys, sync, [], code=1)


@pytest.mark.parametrize(
    "line", [b"[1]", b'{"step": "a"}', b'{"a": 1}', b"\xff", b"\0", b"[" * 9**5]
)
def test_a_line_that_nobody_wrote_is_named_by_its_number(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "a": 1}\n' + line + b'\n{"step": 3, "a": 1}\n')
    with pytest.raises(DamagedError, match=r"metrics.jsonl: is damaged in line 2; "):
        read_metrics(file)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_json_file_that_is_no_object_is_named(damage, tmp_path):
    file = tmp_path / "status.json"
    file.write_bytes(DAMAGES[damage](b'{"state": "running", "reason": ""}'))
    with pytest.raises(DamagedError, match=r"status.json: is damaged"):
        read_json(file)


def test_lines_lost_from_the_middle_are_told_by_train_and_by_the_report(copied, capsys):
    run, arguments = copied
    whole = metrics(run)
    assert record(run)["metric_lines"] == len(whole)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    del lines[1:3]
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    (run / "record.json").unlink()
    told = f"2 of the {len(whole)} lines that the run wrote are missing"
    assert told in " ".join(said(capsys, train, arguments, code=0).split())
    # Still after the run has gone on, and been recorded once more.
    assert record(run)["metric_lines"] == len(whole)
    assert told in " ".join(said(capsys, report, ["study=single"], code=0).split())


def test_a_branch_and_a_run_from_another_folders_checkpoint_miss_no_line(copied, capsys):
    run, arguments = copied
    for more in (
        ["study=branch", f"fork={run}@8"],
        ["study=moved", f"resume={run}/checkpoints/step-8.ckpt"],
    ):
        assert "missing" not in said(capsys, train, [*arguments, *more], code=0)
        (made,) = Path("runs", more[0].partition("=")[2]).glob("*/seed-0")
        assert record(made)["metric_lines"] == len(metrics(made))
        (made / "record.json").unlink()
        assert "missing" not in said(capsys, train, [*arguments, *more[:1]], code=0)
