"""Silence of `watch` and the recorder while a user's code is imported only to build its model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

GUARD = 'if __name__ == "__main__":'

_listeners: list[Callable[[], None]] = []


@contextmanager
def muted(said: Callable[[str], None] | None = None, *, module: str = "") -> Iterator[None]:
    """Inside, `watch` and the recorder say nothing and write no incident.

    Args:
        said: shows one line, once, if the code inside watches a training; None: shows nothing.
        module: the module that is imported, named in the line.
    """
    lines = []
    if said is not None:
        lines.append(
            f"{module}: its training code runs again, because it has no {GUARD} guard; no incident"
            " is written"
        )

    def listen() -> None:
        if said is not None and lines:
            said(lines.pop())

    _listeners.append(listen)
    try:
        yield
    finally:
        _listeners.remove(listen)


def is_muted() -> bool:
    """Whether the present code is only imported; the first call that finds so is told to the user.

    To be called where a training begins to be watched.
    """
    for listen in _listeners:
        listen()
    return bool(_listeners)
