"""Jobs on a cluster that Slurm runs: what is different from jobs of this machine."""

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
"""Its option in conf/hydra/launcher."""

ONE = ("nodes", "tasks_per_node")
"""Fields of the launcher that a job has one of: a run starts its own processes."""

POSITIVE = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""With which Slurm, or submitit in its name, asks a job to end."""


def check_cluster(
    trainers: Sequence[TrainerConfig], tracking: TrackingConfig, fields: Mapping[str, Any]
) -> None:
    """Raises InputError where Slurm is not here, or cannot do what is asked of it.

    Args:
        trainers: of the runs.
        tracking: of all of them.
        fields: of the launcher; one that is None is left to the cluster.
    """
    if shutil.which("sbatch") is None:
        raise InputError("hydra/launcher=slurm: no sbatch is here, the command that submits jobs")
    if any(trainer.accelerator == "auto" for trainer in trainers):
        raise InputError(
            "trainer.accelerator=auto: what another node has cannot be seen from here;"
            " trainer.accelerator=gpu or cpu says it"
        )
    uri = tracking.uri or default_uri()
    if tracking.mlflow and not is_server(uri):
        raise InputError(
            f"tracking.uri={uri}: must be a server's address, also by MLFLOW_TRACKING_URI: jobs on"
            " several nodes cannot share a file; or tracking=local, and python -m src.sync"
            " afterwards"
        )
    for name, value in fields.items():
        if name in ONE and value not in (None, 1):
            raise InputError(
                f"hydra.launcher.{name}={value}: must be 1; a run starts its own processes, on one"
                " node"
            )
        if name in POSITIVE and value is not None and value < 1:
            raise InputError(f"hydra.launcher.{name}={value}: must be at least 1")
    delay, seconds = fields["signal_delay_s"], 60 * fields["timeout_min"]
    if not 0 < delay < seconds:
        raise InputError(
            f"hydra.launcher.signal_delay_s={delay}: must be above 0 and below the {seconds} s of"
            " timeout_min"
        )
    num_gpus = fields.get("gpus_per_node")
    needed = max((t.devices for t in trainers if t.accelerator == "gpu"), default=0)
    if num_gpus is not None and num_gpus < needed:
        raise InputError(
            f"hydra.launcher.gpus_per_node={num_gpus}: must be at least trainer.devices={needed},"
            " all of one run's being on one node"
        )


def take_signals() -> None:
    """In a training process: SIGTERM alone is for it; the others are for the process it is in."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def cancel_waiting(name: str) -> bool:
    """Takes jobs of this name that have not begun out of the queue; those that run go on.

    Returns:
        Whether Slurm has answered.
    """
    return _asked("scancel", "--me", "--state=PENDING", f"--name={name}") is not None


def is_queued(name: str) -> bool:
    """Whether jobs of this name wait or run; True where Slurm does not answer."""
    return _asked("squeue", "--me", "--noheader", f"--name={name}") != ""


def _asked(*command: str) -> str | None:
    """What a command of Slurm's says; None where it fails."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except subprocess.SubprocessError:
        return None
    return done.stdout.strip()


class Preemption:
    """Slurm's wish that a job ends: it has a more urgent one, or the time is up.

    Its signals reach all processes of a job. From `noting` on this process notes them; those that
    it starts inside have them blocked until they call `take_signals`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Begins to note signals; one that comes inside is noted at its end."""
        # It would unblock some of them, were it started inside.
        resource_tracker.ensure_running()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The first says why: at the end of its time a job gets SIGTERM as well.
        if self.signal is None:
            self.signal = number

    def obey(self) -> None:
        """Ends as it was asked, now that all is saved: submitit has the job started again.

        After SIGTERM Slurm has decided already whether it does; an end of our own would look like a
        job that is done.
        """
        assert self.signal is not None
        before = self._before[self.signal]
        if self.signal != signal.SIGTERM and callable(before):
            before(self.signal, None)
        while True:
            time.sleep(1.0)
