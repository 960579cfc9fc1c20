"""Goes through all run folders and sends MLflow what it has missed."""

from pathlib import Path

from src.common import terminal
from src.common.errors import InputError, nearest
from src.common.run_folder import RunFolder, check_study
from src.common.tracking_address import default_uri
from src.tracking.client import Server
from src.tracking.labels import host
from src.tracking.new_state import ensure_state
from src.tracking.push import is_behind, push
from src.tracking.push_state import (
    is_held,
    is_sweep,
    read_state,
    state_files,
    writer_lock,
)
from src.tracking.stale_runs import tracked_folders

FAILURE = 1


def sync(*, runs: Path, study: str | None, uri: str | None) -> int:
    """Sends what is missing; prints a line for each run or sweep, and a summary.

    Args:
        runs: the folder of all studies.
        study: the name of one study; None: all.
        uri: the server or database; None: for each run the one that it was meant for.

    Returns:
        The exit code: 1 if a server could not be reached or a folder could not be read, else 0.

    Raises:
        InputError: the folder or the study does not exist.
    """
    studies = _studies(runs, study)
    server = None if uri is None else Server(uri)
    # Checked before any state is written for this server, because the address may be mistyped.
    problem = None if server is None else server.connection_error()
    if server is not None and problem is not None:
        terminal.error(server.trouble(problem))
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
            f"study={study}: {runs} holds no run of this study;"
            f" {nearest(study, found)}allowed: {', '.join(found) or 'none yet'}"
        )
    return [found[study]]


class _Walk:
    """Sends folder by folder, counts them, and remembers which servers do not answer."""

    def __init__(self, server: Server | None) -> None:
        self.server = server
        self._servers: dict[str, Server] = {}
        self._unreachable: set[str] = set()
        self._failed = False
        self._num_sent = self._num_current = self._num_running = self._num_unsent = 0

    def visit(self, folder: Path) -> None:
        """Sends what is missing of a run or a sweep to each of its servers."""
        try:
            # The lock is tried only if the run may be in progress, because a run that starts at
            # that moment would find it taken.
            if _is_open(folder) and is_held(writer_lock(folder)):
                self._num_running += not is_sweep(folder)
                return
            uris = self._servers_of(folder)
        except (InputError, OSError) as error:
            self._fail(str(error))
            return
        sent = [self._send(folder, self._server(uri)) for uri in uris]
        if any(each is None for each in sent):
            self._num_unsent += not is_sweep(folder)
        elif not sent:
            return
        elif any(sent):
            self._num_sent += not is_sweep(folder)
        else:
            self._num_current += not is_sweep(folder)

    def end(self) -> int:
        """Prints the summary; returns the exit code."""
        items = [f"{self._num_sent} run{'' if self._num_sent == 1 else 's'} brought up to date"]
        items.append(f"{self._num_current} already up to date")
        if self._num_unsent:
            items.append(f"{self._num_unsent} not sent")
        if self._num_running:
            items.append(f"{self._num_running} in progress")
        terminal.say(", ".join(items))
        return FAILURE if self._failed else 0

    def _server(self, uri: str) -> Server:
        return self._servers.setdefault(uri, Server(uri))

    def _servers_of(self, folder: Path) -> list[str]:
        """The addresses of the servers to which a folder is to be sent."""
        if self.server is not None:
            uri = self.server.uri
            return [] if ensure_state(folder, uri) is None else [uri]
        states = [state for file in state_files(folder) if (state := read_state(file)) is not None]
        if states or is_sweep(folder):
            # Without a record, only the machine of a run can know whether it is still in progress.
            return [s.uri for s in states if s.tags.get("host") == host() or _has_ended(folder)]
        # The run was killed before mirroring began, so that it has no state yet.
        tracking = (RunFolder(folder).read_config() or {}).get("tracking", {})
        if not tracking.get("mlflow"):
            return []
        return [Server(tracking["uri"] or default_uri()).uri]

    def _send(self, folder: Path, server: Server) -> bool | None:
        """Whether anything was sent; None if that failed."""
        if server.uri in self._unreachable:
            return None
        try:
            pushed = push(folder, server, over=True)
        except Exception as error:  # The other folders must be tried in any case.
            if isinstance(error, InputError):
                self._fail(str(error))
            elif server.connection_error() is None:
                self._fail(f"{folder}: {server.trouble(error)}")
            else:
                self._unreachable.add(server.uri)
                self._fail(server.trouble(error))
            return None
        if pushed:
            terminal.say(f"{folder}: {pushed}")
        return bool(pushed)

    def _fail(self, line: str) -> None:
        self._failed = True
        terminal.error(line)


def _is_open(folder: Path) -> bool:
    """Whether the process of a run may still be running, as far as its states tell."""
    files = state_files(folder)
    return not files or any(is_behind(folder, file) for file in files)


def _has_ended(folder: Path) -> bool:
    return (folder / "record.json").is_file()
