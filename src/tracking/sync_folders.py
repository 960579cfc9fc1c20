"""Walks all run folders and brings into MLflow what it has missed of them."""

import dataclasses
from pathlib import Path
from typing import Any

from src.common import terminal
from src.common.errors import InputError, damaged, nearest
from src.common.run_folder import RunFolder, check_study, read_json
from src.common.tracking_address import masked
from src.tracking.client import Server, default_uri
from src.tracking.labels import host
from src.tracking.push import begin, begin_sweep, deliver, is_behind
from src.tracking.push_state import (
    KILLED,
    MLFLOW_STATUS,
    changing,
    is_held,
    is_sweep,
    milliseconds,
    read_state,
    state_file,
    state_files,
    writer_lock,
)
from src.tracking.stale_runs import tracked_folders

FAILURE = 1


def sync(*, runs: Path, study: str | None, uri: str | None) -> int:
    """Prints a line for everything that it brings, and what it came to.

    Args:
        runs: the folder of all studies.
        study: one of them; None: all.
        uri: the server or database; None: for each run the one that it was meant for.

    Returns:
        0; 1 where a server could not be reached or a folder not be read.

    Raises:
        InputError: there is no such folder or study.
    """
    studies = _studies(runs, study)
    server = None if uri is None else Server(uri)
    # Before anything is noted as meant for it: the address may be mistyped.
    silence = None if server is None else server.silence()
    if server is not None and silence is not None:
        terminal.error(server.trouble(silence))
        return FAILURE
    walk = _Walk(server)
    for folder in studies:
        for tracked in tracked_folders(folder):
            walk.visit(tracked)
    return walk.end()


def _studies(runs: Path, study: str | None) -> list[Path]:
    if study is not None:
        check_study(study)
    if not runs.is_dir():
        raise InputError(f"paths.runs={runs}: no such folder")
    found = {path.name: path for path in sorted(runs.glob("*")) if tracked_folders(path)}
    if study is None:
        return list(found.values())
    if study not in found:
        raise InputError(
            f"study={study}: no run of it lies in {runs};"
            f" {nearest(study, found)}allowed: {', '.join(found) or 'none yet'}"
        )
    return [found[study]]


class _Walk:
    """Counts, and remembers which servers do not answer."""

    def __init__(self, server: Server | None) -> None:
        self.server = server
        self._servers: dict[str, Server] = {}
        self._away: set[str] = set()
        self._failed = False
        self._brought = self._current = self._running = self._left = 0

    def visit(self, folder: Path) -> None:
        """Brings what is missing of a run or a sweep, in each of its places."""
        try:
            # A lock is only tried where it matters: a run that starts just then would be refused.
            if _is_open(folder) and is_held(writer_lock(folder)):
                self._running += not is_sweep(folder)
                return
            uris = self._places(folder)
        except (InputError, OSError) as error:
            self._fail(str(error))
            return
        news = [self._bring(folder, self._server(uri)) for uri in uris]
        if any(new is None for new in news):
            self._left += not is_sweep(folder)
        elif not news:
            return
        elif any(news):
            self._brought += not is_sweep(folder)
        else:
            self._current += not is_sweep(folder)

    def end(self) -> int:
        """Says what it came to; returns the exit code."""
        said = [f"{self._brought} run{'' if self._brought == 1 else 's'} brought up to date"]
        said.append(f"{self._current} {'was' if self._current == 1 else 'were'}")
        if self._left:
            said.append(f"{self._left} could not be")
        if self._running:
            said.append(f"{self._running} in progress")
        terminal.say(", ".join(said))
        return FAILURE if self._failed else 0

    def _server(self, uri: str) -> Server:
        return self._servers.setdefault(uri, Server(uri))

    def _places(self, folder: Path) -> list[str]:
        """Where a folder belongs, with a state for each."""
        if self.server is not None:
            uri = self.server.uri
            if read_state(state_file(folder, uri)) is None:
                start = _begin_past_sweep if is_sweep(folder) else _begin_past_run
                if not start(folder, uri):
                    return []
            return [uri]
        states = [state for file in state_files(folder) if (state := read_state(file)) is not None]
        if states or is_sweep(folder):
            # Whether a run of another machine goes on cannot be told from here.
            ours = [s.uri for s in states if s.tags.get("host") == host() or _has_ended(folder)]
            return ours
        # Killed before it had begun to be mirrored.
        tracking = (RunFolder(folder).read_config() or {}).get("tracking", {})
        if not tracking.get("mlflow"):
            return []
        uri = Server(tracking["uri"] or default_uri()).uri
        _begin_past_run(folder, uri)
        return [uri]

    def _bring(self, folder: Path, server: Server) -> bool | None:
        """Whether anything was missing; None where it could not be brought."""
        if server.uri in self._away:
            return None
        try:
            news = deliver(folder, server, over=True)
        except Exception as error:  # of whatever kind, the other folders are to be tried
            if isinstance(error, InputError):
                self._fail(str(error))
            elif server.silence() is None:
                self._fail(f"{folder}: {server.trouble(error)}")
            else:
                self._away.add(server.uri)
                self._fail(server.trouble(error))
            return None
        if news:
            terminal.say(f"{folder}: {news}")
        return bool(news)

    def _fail(self, line: str) -> None:
        self._failed = True
        terminal.error(line)


def _is_open(folder: Path) -> bool:
    """Whether the process of a run may still be there, as far as its states tell."""
    files = state_files(folder)
    return not files or any(is_behind(folder, file) for file in files)


def _has_ended(folder: Path) -> bool:
    return (folder / "record.json").is_file()


def _begin_past_run(folder: Path, uri: str) -> bool:
    with damaged(folder / "record.json"):
        facts = read_json(folder / "record.json") or {}
    begin(folder, uri, facts=facts, parent_run_id=None, running=False)
    return True


def _begin_past_sweep(folder: Path, uri: str) -> bool:
    """From what it has been elsewhere in MLflow, else from what it has left beside its runs."""
    for other in map(read_state, state_files(folder)):
        if other is not None:
            fresh: dict[str, Any] = {"run_id": None, "described": False, "closed": False}
            dataclasses.replace(other, uri=uri, **fresh).write(state_file(folder, uri))
            return True
    file = folder.with_name(f"{folder.name}.json")
    with damaged(file):
        left = read_json(file)
        if left is None:
            return False
        command = masked(left["command"])
        begin_sweep(folder, uri, left["study"], command=command, description="")
        with changing(folder, uri) as state:
            state.begun = milliseconds(left["started"])
            state.ended = milliseconds(left["ended"])
            state.status = MLFLOW_STATUS.get(left["status"], KILLED)
    return True
