"""Bad input to every command: one line, exit code 2, and nothing written."""

import importlib
import os
import time
from pathlib import Path

import pytest

from src.common import override_grammar
from src.common.run_folder import check_study
from src.lab.__main__ import COMMANDS as LAB
from tests.conftest import TINY
from tests.runs import lab

LONG = "x" * 300
HUGE = "99999999999999999999"
LONGER = "9" * 5000
"""More digits than Python reads."""
DATABASE = "sqlite:///nope/dir/x.db"
ABSURD = 10**12

TRAIN = {
    f"study={LONG}": "has 300 characters, must have at most 255",
    f"paths.runs={LONG}": "is too long for the file system",
    f"paths.runs={'/y' * 2100}": "is too long for the file system",
    "paths.runs=": "is empty",
    "paths.cache=": "is empty",
    "resume=": "is empty",
    "init=": "is empty",
    "fork=": "is empty",
    "data=text data.path=": "is empty",
    "data=text data.path=''": "is empty",
    "tokenizer=smollm2 tokenizer.path=": "is empty",
    "tracking.uri=": "is empty",
    f"recipe.max_steps={HUGE}": "at most 64 bits",
    f"recipe.log_every={HUGE}": "at most 64 bits",
    f"save_at=[{HUGE}]": "at most 64 bits",
    f"seed={HUGE}": "at most 64 bits",
    "recipe.max_steps=9999999999": "must be at most 1,000,000,000",
    "tracking.uri=foo://bar": "tracking.uri=foo://bar: must be one of http://host:port",
    "tracking.uri=http://": "names no host",
    "tracking.uri=http://host:x": "is no address",
    "tracking.uri=mlruns": "must be one of http://host:port",
    "tracking.uri=sqlite:///": "must name a file",
    f"tracking.uri={DATABASE}": "nope/dir: no such folder",
    "tracking.uri=foo://me:hunter2@bar?token=hunter2": "tracking.uri=foo://bar: must be one of",
    "stability=[clip03,clip03]": "stability=[clip03,clip03]: names a remedy twice",
    "--multirun stability=[clip03,clip03]": "names a remedy twice",
    f"--multirun seed=0,{HUGE}": "at most 64 bits",
    f"seed={LONGER}": "an integer of more than 64 bits",
    f"--multirun seed=0,{LONGER}": "an integer of more than 64 bits",
    f"--multirun study={LONG} seed=0,1": "has 300 characters",
    f"--multirun tracking.uri={DATABASE} seed=0,1": "no such folder",
    "--multirun paths.runs= seed=0,1": "is empty",
}
SIZES = (
    *(f"model.{name}" for name in ("hidden_dim", "num_layers", "num_heads", "inner_dim")),
    *("model.head_dim", "model.vocab_size", "ffn.inner_dim", "ffn.num_routed", "ffn.num_shared"),
    *("attention.q_latent_dim", "attention.kv_latent_dim", "recipe.seq_len"),
    *("recipe.batch_size", "recipe.accumulate", "recipe.num_validations"),
)
TRAIN |= {f"{field}={ABSURD}": "must be at most" for field in SIZES}
TRAIN |= {
    "model.hidden_dim=300000 model.num_heads=3 model.num_layers=100": "GiB of memory, and this",
    "recipe.batch_size=1000000 model.hidden_dim=999": "GiB of memory, and this",
}
DESCRIBE = {
    **{f"{field}={ABSURD}": "must be at most" for field in SIZES},
    f"study={LONG}": "has 300 characters",
    "paths.runs=": "is empty",
    "tracking.uri=foo://bar": "must be one of",
}
OTHERS = {
    "generate": {
        "run=": "is empty",
        "run=null": "must be a file or a folder",
        "run=[a,b]": "must be a file or a folder",
        "run=x prompts_file=": "is empty",
        f"run=x seed={HUGE}": "at most 64 bits",
        f"run=x max_new_tokens={HUGE}": "at most 64 bits",
    },
    "report": {
        "study=../x": "may hold only letters",
        f"study={LONG}": "has 300 characters",
        "study=a paths.runs=": "is empty",
        "study=a paths.runs=null": "must be a file or a folder",
        "study=a out=": "is empty",
    },
    "replay": {"incident=": "is empty", "incident=null": "must be a file or a folder"},
    "diagnose": {
        "checkpoint=": "is empty",
        "checkpoint=null": "must be a file or a folder",
        "checkpoint=x batch=": "is empty",
        f"checkpoint=x top={HUGE}": "at most 64 bits",
    },
    "audit": {
        "target=a:b checkpoint=": "is empty",
        "target=a:b batch=": "is empty",
        "target=a:b folder=": "is empty",
        "target=a:b dtype=fp8": "must be one of float32, bfloat16, float16",
        "target=a:b inputs=-1": "must be above 0",
        "target=a:b seconds=0": "must be at least 1",
        "target=a:b allow=router": "must be a list",
    },
    "convert": {
        "source= out=b": "is empty",
        "source=a out=": "is empty",
        "source=a out=b calibration=": "is empty",
        f"source=a out=b num_routed={HUGE}": "at most 64 bits",
        f"source=a out=b threads={ABSURD}": "must be at most",
    },
    "sync": {
        "tracking.uri=foo://bar": "must be one of http://host:port",
        "tracking.uri=http://": "names no host",
        f"tracking.uri={DATABASE}": "no such folder",
        "tracking=3": "must be the name of an option",
        "paths.runs=": "is empty",
        "paths.runs=null": "must be a file or a folder",
        "study=../x": "may hold only letters",
    },
    "ui": {
        "tracking.uri=foo://bar": "must be one of http://host:port",
        "tracking.uri=http://": "names no host",
        f"tracking.uri={DATABASE}": "no such folder",
        "paths.runs=": "is empty",
        "paths.runs=null": "must be a file or a folder",
        "study=../x": "may hold only letters",
        f"port={HUGE}": "at most 64 bits",
    },
    "detect": {
        "study=../x": "may hold only letters",
        f"study={'x' * 250}": "must have at most 255",
        "paths.runs=": "is empty",
        "paths.cache=null": "must be a file or a folder",
        "out=": "is empty",
        f"n_jobs={ABSURD}": "must be at most 1,024",
        "seeds=[1,1]": "contains a seed twice",
        "seeds=[true]": "must be a list of seeds",
        f"seeds=[{HUGE}]": "at most 64 bits",
    },
    "bench": {
        "out=": "is empty",
        f"batch_size={ABSURD}": "must be at most",
        f"threads={ABSURD}": "must be at most",
        f"rounds={HUGE}": "at most 64 bits",
    },
    "reproduce": {
        "paths.book=/nope": "paths.book=/nope: no such folder",
        "paths.book=.": "has no study",
        "paths.book=": "is empty",
        "paths.runs=": "is empty",
        f"n_jobs={ABSURD} plan=true": "must be at most",
        "studies=../x": "must be one of",
    },
    "book": {
        "paths.book=/nope": "paths.book=/nope: no such folder",
        "paths.book=": "is empty",
        "paths.runs=": "is empty",
        "studies=../x": "must be one of",
    },
}
CASES = [
    (command, case, said)
    for command, cases in {"train": TRAIN, "describe": DESCRIBE, **OTHERS}.items()
    for case, said in cases.items()
]


@pytest.mark.parametrize(("command", "case", "said"), CASES)
def test_it_gets_one_line_and_exit_code_2_and_nothing_is_written(
    command, case, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    main = lab(command) if command in LAB else importlib.import_module(f"src.{command}").main
    # Of this process alone, however slow the machine.
    begin = time.process_time()
    assert main(case.split(" ")) == 2
    assert time.process_time() - begin < 20
    out, line = capsys.readouterr()
    # What only the memory can tell is told below the first line of the run.
    assert out == "" or (said == "GiB of memory, and this" and out.count("\n") == 1)
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert said in line
    assert "hunter2" not in line
    assert {path.parts[0] for path in map(Path, os.listdir())} <= {".cache"}


def test_an_address_of_the_environment_is_checked_before_anything_is_written(
    tiny, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://me:hunter2@bar")
    mirrored = [a for a in tiny if a != "tracking=local"]
    train = importlib.import_module("src.train").main
    for more in ([], ["--multirun", "seed=0,1"]):
        assert train([*mirrored, *more]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: MLFLOW_TRACKING_URI=foo://bar: must be one of")
    assert os.listdir() == []


def test_a_study_whose_name_a_file_system_takes_is_one():
    check_study("x" * 255)


def test_what_is_legal_stays_legal(tiny):
    from src.config.compose import compose

    for uri in ("http://localhost:5000", "https://host/x", "sqlite:///x.db", "databricks"):
        assert compose("train", [*TINY, f"tracking.uri='{uri}'"]).tracking.uri == uri
    assert compose("train", [*tiny, "seed=9223372036854775807"]).seed == 2**63 - 1
    assert override_grammar.quote_free_text("model.sizes=") == "model.sizes="
