"""MLflow's server, for tests that need a real one."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.runs import free_port


class MlflowServer:
    """`mlflow server`, started and stopped at will on one port and one database."""

    def __init__(self, database: Path) -> None:
        self.port = free_port()
        self.database = database
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self.database}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *where, *store],
            cwd=self.database.parent,
            # Its job queues, which nothing here needs, take most of its start.
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A group of its own, for its workers to end with it.
            start_new_session=True,
        )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
