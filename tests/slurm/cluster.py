"""A Slurm of one node on the loopback address, in a folder of its own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runs import free_port

CPUS = 4

CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Inside there is a cluster; gives the environment in which its commands find it."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    # munged takes no socket that others could replace.
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    ports = {"controller": free_port(), "daemon": free_port()}
    conf.write_text(CONF.format(folder=folder, host=host, cpus=CPUS, **ports))
    env = {**os.environ, "SLURM_CONF": str(conf)}
    sbin = f"/usr/sbin:{os.environ['PATH']}"
    commands = [
        [
            *("munged", "--foreground", "--force", f"--socket={folder}/munge.socket"),
            *(f"--key-file={key}", f"--pid-file={folder}/munged.pid"),
            *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
        ],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    daemons = []
    try:
        for command in commands:
            path = shutil.which(command[0], path=sbin)
            assert path is not None, f"{command[0]} is not installed: make test-slurm does it"
            with (folder / f"{command[0]}.out").open("wb") as out:
                daemons.append(
                    subprocess.Popen([path, *command[1:]], env=env, stdout=out, stderr=out)
                )
            time.sleep(1.0)
        _await_node(env)
        yield env
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _await_node(env: dict[str, str]) -> None:
    for _ in range(60):
        asked = ["sinfo", "--noheader", "--format=%t"]
        done = subprocess.run(asked, env=env, capture_output=True, text=True, check=False)
        if done.stdout.strip() == "idle":
            return
        time.sleep(1.0)
    raise AssertionError(f"the node did not come up: {done.stdout} {done.stderr}")
