"""A process that runs `python -m src.train` and takes steps only on command.

Its protocol is that of `src.lab.benchmark.worker`; it answers first after the run's first step.
"""

import json
import os
import signal
import sys
import time
from typing import Any

from src.common.orphans import end_with

ENDLESS = 10**9
"""Steps of the run, which really ends when the process's input ends."""


def main() -> int:
    """Runs the process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    folder = spec["folder"]
    end_with(spec["parent"])

    from src.lab.benchmark.shapes import Case
    from src.run import lifecycle
    from src.sweep.start import train

    assemble = lifecycle.assemble

    def paced(*args: Any, **kwargs: Any) -> Any:
        run = assemble(*args, **kwargs)
        run.trainer.callbacks.append(_pace(answers))  # type: ignore[attr-defined]
        return run

    lifecycle.assemble = paced
    return train(
        [
            *Case(**spec["case"]).arguments(),
            f"recipe.max_steps={ENDLESS}",
            # Validations would fall into some turns and not into others.
            "recipe.num_validations=1",
            f"paths.runs={folder}/runs",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
        ]
    )


def _pace(answers: Any) -> Any:
    import lightning.pytorch as pl

    class Pace(pl.Callback):
        """Lets a run take the requested number of steps, then waits for the next request."""

        def __init__(self) -> None:
            self.begin = time.perf_counter()
            self.left = 1

        def on_train_batch_end(self, *_: Any) -> None:
            self.left -= 1

        def on_train_batch_start(self, *_: Any) -> None:
            if self.left:
                return
            # Measured at a step's start rather than its end, so that loading data counts.
            answer = {"seconds": [time.perf_counter() - self.begin]}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            line = sys.stdin.readline()
            if line:
                self.left = json.loads(line)["count"]
            else:
                os.kill(os.getpid(), signal.SIGTERM)
                self.left = ENDLESS
            self.begin = time.perf_counter()

    return Pace()


if __name__ == "__main__":
    sys.exit(main())
