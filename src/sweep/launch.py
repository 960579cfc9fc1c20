"""Starts jobs through one of Hydra's launchers."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import joblib
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from joblib.parallel import LokyBackend
from omegaconf import open_dict

from src.common.orphans import end_with
from src.common.override_grammar import quote_free_text
from src.config.hydra_compose import hydra_on_conf
from src.sweep.job import run_job


def launch(jobs: Sequence[Path], settings: Sequence[str], *, name: str, folder: Path) -> None:
    """Runs all jobs and returns when all have ended. Each writes its state to its status file.

    Args:
        jobs: files written by `Job.write`.
        settings: overrides of conf/sweep.yaml, including those of the launcher.
        name: the name of the jobs in a queue.
        folder: where the launcher writes its own files.

    Raises:
        Exception: anything that the launcher raises, for example when it loses a worker.
    """
    from hydra._internal.callbacks import Callbacks

    # A joblib worker waits for its next job for ever, even if the sweep was killed; end_with makes
    # it exit. Hydra's launcher selects the backend by name without arguments, so the backend is
    # registered again under its own name, with the initializer.
    workers = partial(LokyBackend, initializer=end_with, initargs=(os.getpid(),))
    joblib.register_parallel_backend("loky", workers)
    with hydra_on_conf():
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
