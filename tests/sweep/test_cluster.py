"""What is asked of a cluster, before anything is submitted to one."""

from dataclasses import replace

import pytest

from src.config import compose
from src.errors import InputError
from src.sweep import cluster

TRAINER = compose("train", ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=gpu"]).trainer


@pytest.fixture(autouse=True)
def _has_slurm(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize("gpus_per_node", [2, 8, None])
def test_a_job_with_enough_gpus_is_fine(gpus_per_node):
    cluster.check_cluster([TRAINER], gpus_per_node=gpus_per_node)


def test_a_job_with_too_few_gpus_is_refused():
    with pytest.raises(InputError, match=r"gpus_per_node=1: must be at least trainer.devices=2"):
        cluster.check_cluster([TRAINER], gpus_per_node=1)
    cluster.check_cluster([replace(TRAINER, accelerator="cpu")], gpus_per_node=1)


def test_a_device_must_be_named():
    with pytest.raises(InputError, match=r"trainer.accelerator=auto"):
        cluster.check_cluster([replace(TRAINER, accelerator="auto")], gpus_per_node=None)


def test_without_slurm_there_is_one_line(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="no sbatch is here"):
        cluster.check_cluster([TRAINER], gpus_per_node=None)
