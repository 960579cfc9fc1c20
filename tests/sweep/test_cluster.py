"""What is asked of a cluster, before anything is submitted to one."""

from dataclasses import replace

import pytest

from src.common.errors import InputError
from src.config.compose import compose
from src.sweep import cluster
from src.sweep.settings import compose_settings

DDP = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=gpu", "tracking=local"]
TRAINER = compose("train", DDP).trainer
LOCAL = compose("train", DDP).tracking
MLFLOW = compose("train", ["tracking=mlflow"]).tracking


@pytest.fixture(autouse=True)
def _has_slurm(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: f"/usr/bin/{name}")


def check(*arguments: str, trainer=TRAINER, tracking=LOCAL) -> None:
    typed = ["hydra/launcher=slurm", *(f"hydra.launcher.{argument}" for argument in arguments)]
    cluster.check_cluster([trainer], tracking, compose_settings(typed).launcher_fields)


@pytest.mark.parametrize(
    "argument", ["gpus_per_node=2", "gpus_per_node=8", "gpus_per_node=null", "mem_gb=64", "nodes=1"]
)
def test_what_a_cluster_can_do_is_fine(argument):
    check(argument)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("gpus_per_node=1", "gpus_per_node=1: must be at least trainer.devices=2"),
        ("gpus_per_node=-1", "gpus_per_node=-1: must be at least 1"),
        ("cpus_per_task=0", "cpus_per_task=0: must be at least 1"),
        ("timeout_min=0", "timeout_min=0: must be at least 1"),
        (
            "timeout_min=2",
            "signal_delay_s=120: must be above 0 and below 120, the seconds of timeout_min",
        ),
        ("signal_delay_s=0", "signal_delay_s=0: must be above 0"),
        ("nodes=2", "nodes=2: must be 1"),
        ("tasks_per_node=2", "tasks_per_node=2: must be 1"),
        ("array_parallelism=8", "type n_jobs="),
    ],
)
def test_what_would_break_a_job_is_refused(argument, says):
    with pytest.raises(InputError) as error:
        check(argument)
    assert says in str(error.value)


def test_gpus_are_not_asked_for_where_none_is_needed():
    check("gpus_per_node=1", trainer=replace(TRAINER, accelerator="cpu"))


def test_a_device_must_be_named():
    with pytest.raises(InputError, match=r"trainer.accelerator=auto"):
        check(trainer=replace(TRAINER, accelerator="auto"))


@pytest.mark.parametrize("value", ["slurm", "null"])
def test_a_launcher_is_chosen_with_a_slash(value):
    with pytest.raises(InputError, match=f"hydra.launcher={value}: type hydra/launcher="):
        compose_settings([f"hydra.launcher={value}"])


def test_without_slurm_there_is_one_line(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="sbatch, which submits jobs, is not installed here"):
        check()


@pytest.mark.parametrize("uri", ["http://tracking:5000", "postgresql://me@db/mlflow"])
def test_jobs_write_to_a_server(uri, monkeypatch):
    check(tracking=replace(MLFLOW, uri=uri))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    check(tracking=MLFLOW)


@pytest.mark.parametrize(
    "uri",
    ["sqlite:///mlflow.db", "file:///shared/mlruns", "mlruns", "sqlite+pysqlite:///x.db", None],
)
def test_jobs_on_several_nodes_share_no_file(uri, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError) as error:
        check(tracking=replace(MLFLOW, uri=uri))
    assert f"tracking.uri={uri or 'sqlite:///mlflow.db'}: must be the address" in str(error.value)
