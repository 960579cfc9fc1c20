"""Code of somebody else's: found by its name, called, and its errors told in one line."""

import contextlib
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nonfinite.random_state import host_states, set_host_states
from src.common.errors import InputError
from src.common.random_streams import seed_global

TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""package.module:callable."""


@contextlib.contextmanager
def running(what: str) -> Iterator[None]:
    """For code of somebody else's: what it raises is an InputError, what it prints is on stderr.

    Args:
        what: begins the line of the error.
    """
    try:
        # stdout belongs to the command, whose answer another program may read.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except InputError:
        raise
    # Foreign code may raise anything, and leave the interpreter.
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {_said(error)}") from error


def _said(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def load_callable(target: str, *, field: str) -> Callable[..., Any]:
    """What a target names.

    Args:
        target: package.module:callable.
        field: what the user typed it for, named in errors.

    Raises:
        InputError: it has another form, cannot be imported, or is not to be called.
    """
    if not TARGET.fullmatch(target):
        raise InputError(f"{field}={target}: must be package.module:callable")
    module, _, path = target.partition(":")
    with running(f"{field}={target}"):
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    if not callable(found):
        raise InputError(f"{field}={target}: is a {type(found).__name__}, nothing to be called")
    called: Callable[..., Any] = found
    return called


def call(
    target: str,
    kwargs: dict[str, Any],
    *,
    field: str,
    vocab_size: int | None,
    max_seq_len: int | None,
) -> nn.Module:
    """The module that a target gives.

    Args:
        target: package.module:callable.
        kwargs: its keyword arguments.
        field: what the user typed it for, named in errors.
        vocab_size: handed over where it has a parameter of this name; None: unknown.
        max_seq_len: the same.

    Raises:
        InputError: it raises, gives something else, or nothing that can be trained.
    """
    build = load_callable(target, field=field)
    known = {"vocab_size": vocab_size, "max_seq_len": max_seq_len}
    with running(f"{field}={target}"):
        parameters = inspect.signature(build).parameters
        wanted = {n: v for n, v in known.items() if n in parameters and v is not None}
        model = build(**{**wanted, **kwargs})
    if not isinstance(model, nn.Module):
        raise InputError(f"{field}={target}: gives a {type(model).__name__}, must be an nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{field}={target}: gives a module without a parameter to be trained")
    return model


def source_hash(target: str, *, field: str) -> str:
    """The hash of the file in which a target is written.

    Args:
        target: package.module:callable.
        field: what the user typed it for, named in errors.

    Raises:
        InputError: it is not to be had, or not written in Python.
    """
    found = load_callable(target, field=field)
    while isinstance(found, partial):
        found = found.func
    found = inspect.unwrap(found)
    if not inspect.isroutine(found) and not inspect.isclass(found):
        found = type(found)
    try:
        source = inspect.getsourcefile(found)
        content = None if source is None else Path(source).read_bytes()
    except (TypeError, OSError):
        content = None
    if content is None:
        raise InputError(
            f"{field}={target}: is written in no file of Python's, whose hash tells one model from"
            " another; name a function of yours that calls it"
        )
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, those generators begin at a seed; afterwards they are where they were."""
    host = host_states()
    with torch.random.fork_rng(devices=[]):
        seed_global(seed)
        try:
            yield
        finally:
            set_host_states(host)
