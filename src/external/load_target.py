"""Loads and calls a user's code by name, and reports its errors in one line."""

import contextlib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nonfinite.builders import BuilderError, check_form, find, missing_arguments
from nonfinite.muting import muted
from nonfinite.snapshot import host_states, set_host_states
from nonfinite.source_lines import short_path
from src.common import terminal
from src.common.errors import InputError
from src.common.random_streams import seed_global

NOT_USERS = ("<", sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]))
"""Beginnings of files that are not a user's: Python's, installed packages, and this project's."""


@contextlib.contextmanager
def running(what: str) -> Iterator[None]:
    """Runs a user's code: turns what it raises into an InputError, and sends its prints to stderr.

    Args:
        what: what is running; the error line begins with it.
    """
    try:
        # The command's own output goes to stdout, where another program may read it.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except InputError:
        raise
    # A user's code may raise anything, and may call sys.exit.
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    told = f"{type(error).__name__}: {first}" if first else type(error).__name__
    place = _users_line(error)
    return told if place is None else f"{told} ({place})"


def _users_line(error: BaseException) -> str | None:
    """The innermost line of an error's traceback that is in a user's file, such as model.py:12."""
    found = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith(NOT_USERS):
            found = f"{short_path(file)}:{number}"
    return found


def load_callable(target: str, *, field: str) -> Callable[..., Any]:
    """The callable that a target refers to.

    Args:
        target: package.module:callable.
        field: the field that holds the target, named in errors.

    Raises:
        InputError: the target is malformed, cannot be imported, or is not callable.
    """
    try:
        check_form(target)
    except BuilderError as error:
        raise InputError(f"{field}={target}: {error}") from error
    module = target.partition(":")[0]
    _check_not_hidden(module, target, field=field)
    try:
        # A script that is imported trains again if it has no guard; it must overwrite nothing.
        with running(f"{field}={target}"), muted(terminal.warn, module=module):
            return find(target)
    except InputError as error:
        if isinstance(error.__cause__, BuilderError):
            raise InputError(f"{field}={target}: {error.__cause__}") from error
        raise


def _check_not_hidden(module: str, target: str, *, field: str) -> None:
    """Raises InputError for a module in a package of the user's that is called src, as ours is."""
    package, _, rest = module.partition(".")
    if package != "src" or not rest:
        return
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(module) is not None:
            return
    raise InputError(
        f"{field}={target}: there is no {module} in this project, whose own package is called src"
        f" and hides yours; type {field}={target.removeprefix('src.')} and put your folder src into"
        " PYTHONPATH, or rename your package"
    )


def call(
    target: str,
    kwargs: dict[str, Any],
    *,
    field: str,
    vocab_size: int | None,
    max_seq_len: int | None,
) -> nn.Module:
    """The module that a target returns.

    Args:
        target: package.module:callable.
        kwargs: keyword arguments of the target.
        field: the field that holds the target, named in errors.
        vocab_size: passed if the target has a parameter of this name; None: unknown.
        max_seq_len: as vocab_size.

    Raises:
        InputError: the target raises, or does not return a module with a trainable parameter.
    """
    build = load_callable(target, field=field)
    known = {"vocab_size": vocab_size, "max_seq_len": max_seq_len}
    with running(f"{field}={target}"):
        parameters = inspect.signature(build).parameters
        wanted = {n: v for n, v in known.items() if n in parameters and v is not None}
        given = {**wanted, **kwargs}
        needed = missing_arguments(build, given)
        if needed:
            typed = ",".join(f"{name}:..." for name in needed)
            raise InputError(
                f"{field}={target}: needs {' and '.join(needed)}; type"
                f" '{field.replace('target', 'kwargs')}={{{typed}}}'"
            )
        with muted():
            model = build(**given)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{field}={target}: returned a {type(model).__name__}; must return an nn.Module"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{field}={target}: returned a module without trainable parameters")
    # A module with a training step of its own handles its own outputs.
    if not hasattr(model, "training_step"):
        model.register_forward_hook(_logits_alone)
    return model


def _logits_alone(module: nn.Module, args: Any, output: Any) -> Any:
    """The logits of an output that has them as a field, as those of transformers do."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else output


def source_hash(target: str, *, field: str) -> str:
    """The hash of the source file that defines a target.

    Args:
        target: package.module:callable.
        field: the field that holds the target, named in errors.

    Raises:
        InputError: the target has no readable Python source.
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
            f"{field}={target}: has no Python source file, whose hash identifies the model; name a"
            " function of your own that calls it"
        )
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators inside, and restores them afterwards."""
    host = host_states()
    with torch.random.fork_rng(devices=[]):
        seed_global(seed)
        try:
            yield
        finally:
            set_host_states(host)
