"""Jobs on a cluster that Slurm runs: what is different from jobs of this machine."""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from src.errors import InputError
from src.schema import TrainerConfig

LAUNCHER = "slurm"
"""Its option in conf/hydra/launcher."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""With which Slurm, or submitit in its name, asks a job to end."""


def check_cluster(trainers: Iterable[TrainerConfig], *, gpus_per_node: int | None) -> None:
    """Raises InputError where Slurm is not here, or runs do not say what they need of a node.

    Args:
        trainers: of the runs.
        gpus_per_node: that a job asks for; None: it asks otherwise, or the cluster has a default.
    """
    if shutil.which("sbatch") is None:
        raise InputError("hydra/launcher=slurm: no sbatch is here, the command that submits jobs")
    for trainer in trainers:
        if trainer.accelerator == "auto":
            raise InputError(
                "trainer.accelerator=auto: what another node has cannot be seen from here;"
                " trainer.accelerator=gpu or cpu says it"
            )
        given = trainer.devices if gpus_per_node is None else gpus_per_node
        if trainer.accelerator == "gpu" and given < trainer.devices:
            raise InputError(
                f"hydra.launcher.gpus_per_node={given}: must be at least"
                f" trainer.devices={trainer.devices}, all of one run's being on one node"
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
