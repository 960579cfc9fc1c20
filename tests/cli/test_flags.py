"""Flags: what shows the configuration, plan and options, and what adds options of one's own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from src.cli.completion import candidates
from src.config.hydra_compose import CONFIG_DIR
from src.train import main
from tests.runs import ROOT, record, start

OPTION = """
# Attention of one's own sizes.
defaults:
  - /schema/attention/gqa@_here_
  - _self_

num_kv_heads: 1
rope_dim: 4
qk_norm: true
"""
EXPERIMENT = """
# @package _global_
hydra:
  sweeper:
    params:
      attention: gqa,mine
      seed: 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder with an option and an experiment of the user's own."""
    # Set and deleted, so that what a command sets in this process is taken back.
    monkeypatch.setenv(CONFIG_DIR, "")
    folder = tmp_path / "own"
    for name, text in (("attention/mine", OPTION), ("experiment/narrow", EXPERIMENT)):
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text.lstrip())
    return folder


def test_cfg_shows_what_config_yaml_will_hold(tiny, capsys):
    assert main([*tiny, "stability=clip03", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["recipe"]["clip_norm"] == 0.3
    assert os.listdir() == []
    assert main([*tiny, "stability=clip03"]) == 0
    (file,) = Path("runs").rglob("config.yaml")
    written = yaml.safe_load(file.read_text())
    del written["config_hash"]
    assert shown == written


def test_cfg_checks_values_and_works_for_every_command(tiny, capsys):
    assert main([*tiny, "recipe.max_steps=0", "--cfg", "job"]) == 2
    assert main([*tiny, "--multirun", "seed=0,1", "--cfg=job"]) == 2
    assert "leave out --multirun" in capsys.readouterr().err
    from src import generate

    assert generate.main(["run=x", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["temperature"] == 0.8


def test_plan_of_one_run_shows_configuration_size_and_cost_and_writes_nothing(tiny, capsys):
    arguments = [a for a in tiny if not a.startswith("paths.cache")]
    assert main([*arguments, "plan=true"]) == 0
    out = capsys.readouterr().out
    for part in (
        "max_steps: 12",
        "parameters",
        "FLOPs",
        "time on cpu",
        "runs/single/mlha+moe+none",
    ):
        assert part in out
    assert not Path("runs").exists()


def test_plan_of_a_finished_run_says_so(tiny, capsys):
    assert main(tiny) == 0
    capsys.readouterr()
    assert main([*tiny, "plan=true"]) == 0
    assert "is already finished; type rerun=true to train it again" in capsys.readouterr().out


def test_plan_false_trains(tiny, capsys):
    assert main([*tiny, "plan=false"]) == 0
    assert len(list(Path("runs").rglob("record.json"))) == 1


def test_a_run_says_at_once_what_it_is(tiny, capsys):
    assert main([*tiny, "stability=ema"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("mlha + moe, ema, model proxy: 12 steps on the CPU, in runs/single/")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("data=text data.path=nope.txt", "data.path=nope.txt: no such file"),
        ("data=text data.path=short.txt", "must be below"),
        ("trainer=gpu", "trainer.accelerator=gpu: no GPU is available here"),
        ("resume=runs/none.ckpt", "resume=runs/none.ckpt"),
        ("data=text data.path=short.txt --multirun seed=0,1", "must be below"),
    ],
)
def test_a_run_that_cannot_start_is_not_announced(line, part, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("short.txt").write_text("To be, or not\n")
    arguments = [a for a in tiny if not a.startswith(("data", "trainer"))]
    assert main([*arguments, *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def test_info_lists_options_and_versions(capsys):
    assert main(["--info"]) == 0
    out = capsys.readouterr().out
    assert "attention=external, gqa, mlha" in out
    assert str(ROOT / "conf") in out
    assert "hydra-core" in out


def test_config_dir_adds_options(tiny, own, capsys):
    assert main([*tiny, "--config-dir", str(own), "attention=mine"]) == 0
    (file,) = Path("runs").rglob("config.yaml")
    assert yaml.safe_load(file.read_text())["attention"]["num_kv_heads"] == 1
    assert main([*tiny, f"--config-dir={own}", "attention=mime"]) == 2
    assert "did you mean mine? allowed: external, gqa, mine, mlha" in capsys.readouterr().err
    assert main(["--info"]) == 0
    assert str(own) in capsys.readouterr().out


@pytest.mark.slow
def test_config_dir_adds_experiments_and_reaches_the_jobs_of_a_sweep(tiny, own, tmp_path):
    arguments = [*tiny, "--multirun", "--config-dir", str(own), "experiment=narrow"]
    process = start("train", arguments, tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    folders = [file.parent for file in tmp_path.glob("runs/narrow/*/seed-3/record.json")]
    assert {record(folder)["status"] for folder in folders} == {"finished"}
    assert sorted(f.parent.name.partition("+")[0] for f in folders) == ["gqa", "mine"]


def test_a_file_of_the_users_that_conf_has_too_is_refused(tiny, own, capsys):
    shutil.copy(own / "attention" / "mine.yaml", own / "attention" / "gqa.yaml")
    assert main([*tiny, "--config-dir", str(own)]) == 2
    assert "conf/ has attention/gqa.yaml too" in capsys.readouterr().err


def test_completion_knows_fields_options_and_flags():
    assert candidates("recipe.learn", "train") == ["recipe.learning_rate="]
    assert candidates("attention=m", "train") == ["attention=mlha"]
    assert candidates("experiment=stability_s", "train") == ["experiment=stability_sane"]
    assert candidates("rer", "train") == ["rerun="]
    assert candidates("rerun=", "train") == ["rerun=false", "rerun=true"]
    assert candidates("--c", "train") == ["--cfg", "--config-dir"]
    assert candidates("top", "generate") == ["top_k=", "top_p="]


def test_bash_completes_a_command_of_this_project_alone():
    script = """
        eval "$("$PYTHON" -m src.train --shell-completion install=bash)"
        for line in "-m src.train attention=m" "-m src.report stu" "-m pytest stu"; do
            COMP_WORDS=("$PYTHON") COMP_LINE="python $line"
            COMP_POINT=${#COMP_LINE} COMPREPLY=()
            _smoldeepseek_complete
            echo "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.splitlines() == ["mlha", "study=", ""], done.stderr


@pytest.mark.parametrize("command", ["train", "describe", "ui", "report", "lab"])
def test_without_the_environment_one_line_says_how_to_activate_it(command):
    # Without site-packages, as a Python outside .venv.
    done = subprocess.run(
        [sys.executable, "-S", "-m", f"src.{command}", "seed=0"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "is not installed for this Python" in done.stderr
    assert "source .venv/bin/activate" in done.stderr


def test_a_module_of_a_package_called_src_is_explained(tiny, capsys):
    arguments = ["model=external", "model.target=src.net:build", "preset=smoke"]
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert "whose own package is called src and hides yours" in line
    assert "type model.target=net:build" in line
    assert line.count("\n") == 1
