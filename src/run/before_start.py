"""Checks of everything that a run starts from, before it is announced."""

from pathlib import Path

from src.common.environment import code_digest
from src.common.errors import InputError
from src.common.run_folder import RunFolder
from src.common.tracking_address import default_uri
from src.config.compile_choice import check_compiler
from src.config.run_config import RunConfig
from src.data import Corpus
from src.run import start_fork
from src.run.resume import checkpoint_to_resume, finished_record, is_path


def ready_to_start(config: RunConfig) -> Corpus:
    """Reads the data and checks the device, the run folder and the saved state to start from.

    Raises:
        InputError: the run cannot be started; nothing has been trained or written.
    """
    check_machine(config)
    corpus = load_corpus(config)
    config_hash = config.config_hash(corpus.fingerprint)
    if config.rerun or finished_record(config, config_hash) is None:
        check_saved_state(config, config_hash)
    return corpus


def check_machine(config: RunConfig) -> None:
    """Raises InputError for mistakes that can be found before the data are read."""
    # Cached from here on, so that the record names the code that is running, even if source files
    # change during the run.
    code_digest()
    config.trainer.check_device()
    check_compiler(compiled=config.compile, device=config.trainer.device_type)
    if config.tracking.mlflow and config.tracking.uri is None:
        default_uri()  # Called only for its check of the address in the environment.
    if config.rerun and is_path(config.resume):
        raise InputError(
            f"resume={config.resume}: rerun=true starts from step 0; leave one of them out"
        )
    if config.fork is not None and config.resume != "auto":
        raise InputError(
            f"resume={config.resume}: fork= starts from a state of its own; leave one of them out"
        )


def load_corpus(config: RunConfig) -> Corpus:
    """The tokenised data; raises InputError if they cannot be read, or are too few."""
    return config.data.load(
        config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
    )


def check_saved_state(config: RunConfig, config_hash: str) -> None:
    """Raises InputError if the checkpoint or the fork that the run starts from cannot be used."""
    if not config.rerun:
        checkpoint_to_resume(RunFolder(config.folder), config, config_hash)
    if config.fork is not None:
        start_fork.check(config, config.fork)
