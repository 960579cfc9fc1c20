"""Interrupted and resumed equals uninterrupted, bitwise."""

import random
import signal
import time

import pytest
import torch

from src.train import main
from tests.conftest import TINY
from tests.forked import fork
from tests.runs import (
    assert_same_run,
    last_checkpoint,
    made,
    metrics,
    record,
    start,
    stop_after,
    train,
    weights,
)


@pytest.mark.parametrize(
    "options",
    [
        ["stability=ema"],
        ["stability=ema", "recipe.accumulate=2", "recipe.schedule=cosine"],
        ["attention=gqa", "ffn=moe", "recipe.log_every=5", "ffn.router.balance=aux"],
    ],
    ids=["ema", "accumulate", "aux"],
)
@pytest.mark.parametrize("stop_at", [2, 5, 8])
def test_a_run_stopped_at_any_step_and_resumed_equals_one_that_was_not(
    tiny, options, stop_at, monkeypatch
):
    whole = made(tiny, *options, "study=whole")
    arguments = [*tiny, *options, "study=stopped"]
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert main(arguments) == 143
    stopped = whole.parents[2] / "stopped" / whole.parents[0].name / "seed-0"
    assert record(stopped)["status"] == "killed"
    assert record(stopped)["steps"] == stop_at
    assert record(stopped)["outcome"] is None
    assert main(arguments) == 0
    assert record(stopped)["status"] == "finished"
    assert_same_run(whole, stopped)


def test_the_same_seed_twice_is_the_same_run_and_another_is_another(tiny):
    runs = [train(tiny, f"study=s{i}", "stability=ema") for i in (1, 2)]
    assert_same_run(*runs)
    other = train(tiny, "study=s1", "stability=ema", "seed=1")
    assert metrics(other) != metrics(runs[0])
    assert not torch.equal(*(next(iter(weights(run).values())) for run in (other, runs[0])))


def test_a_finished_run_is_shown_again_and_not_trained(tiny, capsys):
    folder = made(tiny)
    before = (folder / "metrics.jsonl").stat().st_mtime_ns, record(folder)
    assert main(tiny) == 0
    assert ((folder / "metrics.jsonl").stat().st_mtime_ns, record(folder)) == before
    assert "is already finished" in capsys.readouterr().out


def test_rerun_moves_the_old_folder_aside(tiny):
    folder = made(tiny)
    assert main([*tiny, "rerun=true"]) == 0
    aside = [path for path in folder.parent.iterdir() if path.name.startswith("seed-0.")]
    assert len(aside) == 1
    assert record(aside[0])["status"] == record(folder)["status"] == "finished"


def test_a_folder_of_another_configuration_is_refused_and_kept(tiny, capsys, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("to be or not to be, that is the question\n" * 50)
    mine = [*(a for a in tiny if "max_chars" not in a), "data=text", f"data.path={file}"]
    folder = train(mine)
    kept = record(folder)
    file.write_text("whether 'tis nobler in the mind to suffer\n" * 50)
    assert main(mine) == 2
    line = capsys.readouterr().err
    assert "holds a run of another configuration (the data or the device)" in line
    assert "rerun=true" in line
    assert record(folder) == kept


def test_resume_never_refuses_an_unfinished_run(tiny, capsys):
    folder = made(tiny)
    (folder / "record.json").unlink()
    assert main([*tiny, "resume=never"]) == 2
    assert "resume=never" in capsys.readouterr().err
    assert main(tiny) == 0


def test_a_damaged_checkpoint_is_named_and_another_can_be_given(tiny, capsys):
    folder = made(tiny)
    whole = metrics(folder)
    (folder / "record.json").unlink()
    last = folder / "checkpoints" / "last.ckpt"
    last.unlink()  # a hard link of the best one may share its bytes
    last.write_bytes(b"PK\x03\x04 not a checkpoint any more")
    assert main(tiny) == 2
    line = capsys.readouterr().err
    assert f"resume={last}: is damaged" in line
    other = folder / "checkpoints" / "step-4.ckpt"
    assert main([*tiny, f"resume={other}"]) == 0
    assert metrics(folder) == whole


def test_a_checkpoint_of_another_configuration_is_refused(tiny, capsys):
    folder = made(tiny)
    other = folder / "checkpoints" / "last.ckpt"
    assert main([*tiny, "recipe.learning_rate=1e-4", f"resume={other}"]) == 2
    assert "learning_rate was 0.005, now 0.0001" in capsys.readouterr().err


def test_a_folder_that_is_being_written_is_left_alone(tiny, capsys):
    from src.common.run_folder import RunFolder

    path = made(tiny)
    (path / "record.json").unlink()
    busy = RunFolder(path)
    busy.open()
    try:
        assert main(tiny) == 2
    finally:
        busy.close()
    assert "is being written by another run" in capsys.readouterr().err


DAMAGE = {
    "config.yaml": [("", "is damaged"), ("a: [", "is damaged"), (None, "is missing")],
    "record.json": [("", "is damaged"), ("{}", "is damaged"), ('{"status":', "is damaged")],
    "metrics.jsonl": [
        ('{"step": 1}\n{"st\n{"step": 3}\n', "is damaged"),
        (None, "has no lines up to the step"),
    ],
    "checkpoints/last.ckpt": [(None, "is missing; resume=")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in DAMAGE.items() for case in cases],
)
def test_a_damaged_or_missing_file_is_named_and_nothing_is_lost(
    name, content, message, tiny, capsys
):
    folder = made(tiny)
    if name != "record.json":
        (folder / "record.json").unlink()
    file = folder / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(tiny) == 2
    line = capsys.readouterr().err
    assert name in line
    assert message in line
    assert line.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == kept
    # What the line advises works.
    assert main([*tiny, "rerun=true"]) == 0


def test_a_damaged_cache_is_made_anew(tiny, shared_cache, tmp_path):
    arguments = [*(a for a in tiny if "paths.cache" not in a), "paths.cache=mine"]
    whole = train(arguments, "study=a")
    for number, (name, content) in enumerate(
        [("train.npy", b"x"), ("val.npy", None), ("tokenizer.json", b"{")]
    ):
        (file,) = tmp_path.glob(f"mine/tokens/*/{name}")
        file.unlink()
        if content:
            file.write_bytes(content)
        assert metrics(train(arguments, f"study=b{number}")) == metrics(whole)


def test_a_run_that_the_guard_ended_stays_ended(tiny):
    arguments = [
        *tiny,
        "ffn=moe_writeup_add",
        "model.sizes.writeup_bias_rate=400.0",
        "recipe.precision=32-true",
        "guard.on_nonfinite=stop",
    ]
    folder = train(arguments)
    ended = record(folder)
    assert ended["outcome"] == "stopped"
    assert ended["steps"] < 12
    assert ended["final"]["guard/skipped"] == ended["guard"]["skipped_steps"] == 1
    lines = metrics(folder)
    (folder / "record.json").unlink()
    assert main(arguments) == 0
    assert (record(folder)["outcome"], record(folder)["steps"]) == ("stopped", ended["steps"])
    assert metrics(folder) == lines


def test_an_explicit_checkpoint_for_a_finished_run_is_refused(tiny, capsys):
    made(tiny)
    assert main([*tiny, "resume=nowhere.ckpt"]) == 2
    assert "is already finished" in capsys.readouterr().err


LONGER = [
    *TINY,
    "stability=ema",
    "recipe.max_steps=200",
    "recipe.checkpoint_every=10",
    "recipe.num_validations=4",
]


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"ended early: {process.communicate()}")
        lines = metrics(folder) if folder.exists() else []
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    pytest.fail("never reached the step")


def test_killed_with_sigkill_at_a_random_step_and_resumed_equals_uninterrupted(tiny, tmp_path):
    first = train(tiny, *LONGER, "study=whole")
    step = random.SystemRandom().randrange(15, 150)
    arguments = [*tiny, *LONGER, "study=killed"]
    folder = tmp_path / "runs" / "killed" / first.parent.name / "seed-0"
    process = fork("train", arguments, tmp_path)
    wait_for_step(folder, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    assert not (folder / "record.json").exists(), step
    assert main(arguments) == 0
    assert_same_run(first, folder)


def test_two_interrupts_in_a_row_still_write_the_record(tmp_path):
    process = fork("train", [*LONGER, "recipe.batch_size=512"], tmp_path)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("runs/*/*/seed-0/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (folder,) = tmp_path.glob("runs/*/*/seed-0")
    wait_for_step(folder, 1, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert record(folder)["status"] == "killed"


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_ctrl_c_while_it_starts_is_one_line(seconds, tmp_path):
    process = start("train", LONGER, tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        # As `stop_after` sends it in this process.
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
    ],
)
def test_signals_save_a_checkpoint_and_write_the_record(number, code, tmp_path):
    process = start("train", [*LONGER, "study=s"], tmp_path)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("runs/s/*/seed-0/checkpoints")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (folder,) = tmp_path.glob("runs/s/*/seed-0")
    wait_for_step(folder, 20, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    assert "to continue, run the same command" in out
    assert record(folder)["status"] == "killed"
    assert last_checkpoint(folder)["global_step"] == record(folder)["steps"] < 200
