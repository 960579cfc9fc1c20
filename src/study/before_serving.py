"""What can stop the pages before they are served: a wrong field, a taken port, no such study.

Imports nothing heavy, so that it is answered at once.
"""

import os
import socket
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from src.cli.field_checks import given_path
from src.common import terminal
from src.common.errors import InputError
from src.common.tracking_address import SERVED, default_uri, fingerprint, given_uri
from src.study.read.find_study import HOW_TO_MAKE_RUNS, check_has_runs, latest_study

LAST_PORT = 65535


def running_server(fields: Mapping[str, Any]) -> str | None:
    """Checks the fields; returns the address of the page if these pages are being served already.

    Raises:
        InputError: a value is wrong, there is no such study, or another program has the port.
    """
    port, must_open = fields["port"], fields["open"]
    if type(port) is not int or not 1024 <= port <= LAST_PORT:
        raise InputError(f"port={port}: must be an integer from 1024 to {LAST_PORT}")
    if type(must_open) is not bool:
        raise InputError(f"open={must_open}: must be true or false")
    runs, study = given_path(fields, "paths.runs"), fields["study"]
    if study is not None:
        check_has_runs(runs, str(study))
    uri = given_uri(fields) or default_uri()
    name = latest_study(runs) if study is None else str(study)
    if has_own_pages(uri) or not is_taken(port):
        if name is None:
            terminal.say(f"there are no runs in {runs} yet; {HOW_TO_MAKE_RUNS}")
        return None
    root = f"http://127.0.0.1:{port}"
    if _database_at(root) == fingerprint(uri):
        return root if name is None else f"{root}{SERVED}/{quote(name)}"
    free = next((p for p in range(port + 1, LAST_PORT + 1) if not is_taken(p)), None)
    field = "PORT" if os.environ.get("MAKELEVEL") else "port"
    raise InputError(f"port={port}: is taken; type {field}={free or '<another>'}")


def has_own_pages(uri: str) -> bool:
    """Whether an address is that of a server, which shows its pages itself."""
    return uri.lower().startswith(("http://", "https://"))


def is_taken(port: int) -> bool:
    """Whether a program on this machine listens on a port."""
    with socket.socket() as tried:
        # As servers do: a connection that has just been closed does not keep the port.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _database_at(root: str) -> str | None:
    """The fingerprint of the database that this project's server shows; None for any other."""
    try:
        with urllib.request.urlopen(f"{root}{SERVED}", timeout=2.0) as answer:
            return str(answer.read(100).decode("ascii", errors="replace"))
    except (OSError, ValueError):
        return None
