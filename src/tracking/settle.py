"""Sees to it that a run exists in MLflow, under the names and with the settings of its state."""

from pathlib import Path
from typing import Any

from src.tracking.client import Server
from src.tracking.push_state import RUNNING, State

KEY = "mirror_key"


def settle(server: Server, state: State, file: Path, *, running: bool) -> bool | None:
    """Makes or finds the run, and describes it unless that is done.

    Args:
        server: where.
        state: of the run; its id is filled in.
        file: of the state.
        running: whether the run goes on, and not only the news of it.

    Returns:
        Whether anything had to be done; None where somebody has deleted the run.
    """
    run = None if state.run_id is None else server.run(state.run_id)
    if run is None:
        # It may have been made just before a crash; or the database is another one by now.
        found = server.search(state.experiment, f"tags.{KEY} = '{state.key}'")
        run = found[0] if found else _create(server, state)
        state.run_id = str(run.info.run_id)
        state.described, state.closed, state.lines_sent = False, False, 0
        state.write(file)
    deleted = run.info.lifecycle_stage == "deleted"
    if state.described:
        return None if deleted else False
    if deleted:
        # It is trained again, so it is wanted.
        server.client.restore_run(state.run_id)
    _describe(server, state, run, running=running)
    state.described = True
    state.write(file)
    return True


def _create(server: Server, state: State) -> Any:
    return server.client.create_run(
        server.experiment_id(state.experiment),
        start_time=state.begun,
        tags={KEY: state.key, **state.tags},
        run_name=state.run_name,
    )


def _describe(server: Server, state: State, run: Any, *, running: bool) -> None:
    assert state.run_id is not None
    tags = dict(state.tags)
    if running:
        server.client.update_run(state.run_id, status=RUNNING)
        # Also because of what an earlier end has left.
        tags["status"] = "running"
        if state.tags["kind"] == "run":
            tags["outcome"] = "running"
        if "mended" in run.data.tags:
            server.client.delete_tag(state.run_id, "mended")
    # Params cannot be changed there; what was set once stays.
    missing = {k: v for k, v in state.params.items() if k not in run.data.params}
    server.log(state.run_id, params=missing, tags=tags)
