"""What is different for jobs on a Slurm cluster, compared with jobs on this machine."""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from src.common.errors import InputError
from src.common.tracking_address import default_uri, is_server
from src.config.schema import TrackingConfig, TrainerConfig

LAUNCHER = "slurm"
"""The option in conf/hydra/launcher."""

MUST_BE_ONE = ("nodes", "tasks_per_node")
"""Fields of the launcher that must be 1, because a run starts its own processes on one node."""

POSITIVE = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb")
"""Fields of the launcher that must be at least 1."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""The signals by which Slurm, or submitit on its behalf, asks a job to end."""


def check_cluster(
    trainers: Sequence[TrainerConfig], tracking: TrackingConfig, fields: Mapping[str, Any]
) -> None:
    """Raises InputError if Slurm is not available or the settings cannot work on a cluster.

    Args:
        trainers: the trainer section of each run.
        tracking: the tracking section, the same for all runs.
        fields: the fields of the launcher; None in a field means the cluster's default.
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "hydra/launcher=slurm: the command sbatch, which submits jobs, is not installed here"
        )
    if any(trainer.accelerator == "auto" for trainer in trainers):
        raise InputError(
            "trainer.accelerator=auto: the devices of other nodes are not known here; type"
            " trainer.accelerator=gpu or cpu"
        )
    uri = tracking.uri or default_uri()
    if tracking.mlflow and not is_server(uri):
        raise InputError(
            f"tracking.uri={uri}: must be the address of a server, because jobs on several nodes"
            " cannot share a file; set it or MLFLOW_TRACKING_URI, or type tracking=local and run"
            " python -m src.sync afterwards"
        )
    for name, value in fields.items():
        if name in MUST_BE_ONE and value not in (None, 1):
            raise InputError(
                f"hydra.launcher.{name}={value}: must be 1, because a run starts its own processes"
                " on one node"
            )
        if name in POSITIVE and value is not None and value < 1:
            raise InputError(f"hydra.launcher.{name}={value}: must be at least 1")
    delay, seconds = fields["signal_delay_s"], 60 * fields["timeout_min"]
    if not 0 < delay < seconds:
        raise InputError(
            f"hydra.launcher.signal_delay_s={delay}: must be above 0 and below {seconds}, the"
            " seconds of timeout_min"
        )
    num_gpus = fields.get("gpus_per_node")
    needed = max((t.devices for t in trainers if t.accelerator == "gpu"), default=0)
    if num_gpus is not None and num_gpus < needed:
        raise InputError(
            f"hydra.launcher.gpus_per_node={num_gpus}: must be at least trainer.devices={needed},"
            " because all devices of a run are on one node"
        )


def take_signals() -> None:
    """Called in a training process: it obeys SIGTERM and leaves the others to its job's worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def cancel_waiting(name: str) -> bool:
    """Cancels jobs of this name that have not started; running jobs continue.

    Returns:
        Whether Slurm answered.
    """
    return _output_of("scancel", "--me", "--state=PENDING", f"--name={name}") is not None


def is_queued(name: str) -> bool:
    """Whether jobs of this name are waiting or running; True if Slurm does not answer."""
    return _output_of("squeue", "--me", "--noheader", f"--name={name}") != ""


def _output_of(*command: str) -> str | None:
    """The output of a Slurm command; None if it fails."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except subprocess.SubprocessError:
        return None
    return done.stdout.strip()


class Preemption:
    """Slurm's request that a job ends, because a more urgent job needs the node or time is up.

    Slurm's signals reach all processes of a job. From `noting` on, this process records them.
    Processes that it starts within `noting` have them blocked until they call `take_signals`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Starts recording signals. One that arrives within this context is recorded at its end."""
        # Started before, because on start-up the tracker unblocks some signals of this process.
        resource_tracker.ensure_running()
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The first signal tells the reason: when its time is up, a job later gets SIGTERM too.
        if self.signal is None:
            self.signal = number

    def obey(self) -> None:
        """Lets the job end as requested, now that everything is saved; does not return.

        submitit's own signal handler makes Slurm requeue the job. After SIGTERM Slurm has already
        decided whether to requeue, and kills the job; exiting here would look like a finished job.
        """
        assert self.signal is not None
        submitit_handler = self._previous[self.signal]
        if self.signal != signal.SIGTERM and callable(submitit_handler):
            submitit_handler(self.signal, None)
        while True:
            time.sleep(1.0)
