"""The end of a run: what is made again, and what a failing disk leaves."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from src.common import storage
from src.common.run_folder import RunFolder
from src.run import lifecycle
from src.train import main
from src.training.checkpoint_writer import Checkpoints
from tests.runs import assert_same_run, record, train


@pytest.mark.parametrize("study", ["single", "some"])
def test_samples_that_are_missing_are_made_again_and_are_the_same(study, tiny, capsys):
    arguments = [*tiny, "stability=ema", f"study={study}"]
    folder = train(arguments)
    before = (folder / "samples.md").read_bytes()
    assert b"## ema weights" in before
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "samples.md").unlink()
    assert main(arguments) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert "more samples" in capsys.readouterr().out


def test_samples_that_fail_leave_the_record_and_mlflow_alone(tiny, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise ValueError("no text")

    ended = []

    class Mirror:
        def finish(self):
            ended.append(True)

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "save_samples", fails)
        patch.setattr(lifecycle, "_mirror", lambda *args: Mirror())
        folder = train(tiny)
    assert record(folder)["status"] == "finished"
    assert ended == [True]
    assert "samples could not be written (ValueError: no text)" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(tiny) == 0
    assert (folder / "samples.md").is_file()


WRITERS = ("metrics.jsonl", "last.part", "record.part", "samples.part", "train.log")

TROUBLES = [
    *((name, errno.ENOSPC) for name in WRITERS),
    *(("last.part", number) for number in (errno.EROFS, errno.EACCES, errno.EIO)),
]


def refuse(patch, name: str, number: int, *, after: int) -> None:
    """Has the file system refuse all writes to a file, but for the first so many."""
    done = []

    def failing(path) -> None:
        done.append(path)
        if len(done) > after:
            raise OSError(number, os.strerror(number), str(path))

    if name == "last.part":
        saved = torch.save

        def save(value, path, *args, **kwargs):
            if len(done) >= after and number == errno.ENOSPC:
                raise RuntimeError(
                    "PytorchStreamWriter failed writing file data/1: file write failed"
                )
            failing(path)
            saved(value, path, *args, **kwargs)

        patch.setattr("src.training.checkpoint_writer.torch.save", save)
    elif name == "metrics.jsonl":

        class Failing:
            def __init__(self, file):
                self.file = file

            def write(self, text):
                failing(self.file.name)
                self.file.write(text)

            def __getattr__(self, attribute):
                return getattr(self.file, attribute)

        from src.run.metrics_writer import MetricsWriter

        begin = MetricsWriter.__init__

        def init(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            self._file = Failing(self._file)

        patch.setattr(MetricsWriter, "__init__", init)
    elif name == "train.log":
        patch.setattr("logging.FileHandler.flush", lambda self: failing("x"), raising=False)
    else:
        written = Path.write_text

        def write_text(self, *args, **kwargs):
            if self.name == name:
                failing(self)
            return written(self, *args, **kwargs)

        patch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize(
    ("name", "number"), TROUBLES, ids=[f"{name}-{errno.errorcode[n]}" for name, n in TROUBLES]
)
def test_a_disk_that_takes_no_more_is_one_line_and_nothing_is_lost(
    name, number, tiny, monkeypatch, capsys
):
    whole = train(tiny, "study=whole")
    arguments = [*tiny, "study=cut"]
    (study,) = {whole.parents[1].with_name("cut")}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        refuse(patch, name, number, after=0 if name in ("record.part", "samples.part") else 1)
        code = main(arguments)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if name in ("samples.part", "train.log"):
        # Of these a run is no worse.
        assert code == 0
    else:
        assert code == 1
        assert error.startswith("error: ") and error.count("\n") == 1
        assert f"{study.name}/{whole.parent.name}/seed-0: cannot be used (" in error
        assert "MB of its disk are free); the same command continues" in error
    assert main(arguments) == 0
    assert_same_run(whole, study / whole.parent.name / "seed-0")
    assert (study / whole.parent.name / "seed-0" / "samples.md").is_file()


def test_a_folder_that_is_deleted_while_it_is_written_is_one_line(tiny, monkeypatch, capsys):
    begin = Checkpoints.on_step_end

    def on_step_end(self, trainer, pl_module, step):
        if step == 8:
            shutil.rmtree(self.folder.parent)
        begin(self, trainer, pl_module, step)

    monkeypatch.setattr(Checkpoints, "on_step_end", on_step_end)
    assert main([*tiny]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "seed-0: cannot be used (" in error


def test_what_a_models_own_code_cannot_open_is_a_failure_of_the_run(tmp_path):
    elsewhere = OSError(errno.ENOENT, "No such file or directory", "/elsewhere/table.npy")
    assert not storage.is_of(tmp_path, elsewhere)
    assert not storage.is_of(tmp_path, ValueError("no"))
    assert storage.is_of(tmp_path, OSError(errno.ENOENT, "gone", str(tmp_path / "x")))
    assert storage.is_of(tmp_path, OSError(errno.ENOSPC, "full"))


def test_a_log_that_cannot_be_written_says_nothing(tmp_path, capsys, monkeypatch):
    import logging

    folder = RunFolder(tmp_path / "run")
    folder.open()

    def flush(self):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("logging.FileHandler.flush", flush, raising=False)
        logging.getLogger("x").warning("a line")
        folder.close()
    assert capsys.readouterr().err == ""
