"""Hands jobs to a launcher of Hydra's."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import hydra
import joblib
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from joblib.parallel import LokyBackend
from omegaconf import open_dict

from src.common.orphans import end_with
from src.common.override_grammar import quote_free_text
from src.config.schema import CONF
from src.sweep.job import run_job


def launch(jobs: Sequence[Path], settings: Sequence[str], *, name: str, folder: Path) -> None:
    """Runs all jobs and returns when all have ended, each with its state in its status file.

    Args:
        jobs: files that `Job.write` has made.
        settings: overrides of conf/sweep.yaml, those of the launcher included.
        name: of the jobs, where a queue shows them.
        folder: for what a launcher writes.

    Raises:
        Exception: whatever the launcher raises when a worker of its own is lost.
    """
    from hydra._internal.callbacks import Callbacks

    # A worker waits for the next job for ever, and so for that of a sweep that was killed. Hydra's
    # launcher names the backend, and passes nothing on to it.
    workers = partial(LokyBackend, initializer=end_with, initargs=(os.getpid(),))
    joblib.register_parallel_backend("loky", workers)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration(
            config_name="sweep", overrides=list(settings), run_mode=RunMode.MULTIRUN
        )
        with open_dict(config):
            config.hydra.job.name = name
            config.hydra.sweep.dir = str(folder)
        HydraConfig.instance().set_config(config)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks(config)),
            task_function=run_job,
            config=config,
        )
        logging.getLogger("hydra").setLevel(logging.WARNING)
        launcher.launch([[quote_free_text(f"job={job}")] for job in jobs], initial_job_idx=0)
