"""Names of callables that build a model: which one to print, and what a typed one refers to."""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

PLACEHOLDER = "your_module:build"
"""Printed where no callable is known; it can be typed, and the answer says what it means."""

MEANING = (
    f"{PLACEHOLDER} stands for a function of yours that takes no arguments and returns the model"
)

NAME = re.compile(r"[\w-]+(\.[\w-]+)*:[A-Za-z_]\w*(\.\w+)*")
"""package.module:callable."""


class BuilderError(ValueError):
    """A typed name of a callable refers to nothing; the text says what to type instead."""


def with_name(command: str, model: nn.Module) -> str:
    """A command with `{model}` replaced by what builds the model in another process."""
    return command.replace("{model}", name_of(model) or PLACEHOLDER)


def name_of(model: nn.Module) -> str | None:
    """`package.module:Class` of a model that another process can build; None if none is known.

    The class must be found by its name from the working directory, and need no arguments.
    """
    kind = type(model)
    module = sys.modules.get(kind.__module__)
    found: Any = module
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    if module is None or found is not kind or not _takes_none(kind):
        return None
    name = _importable(module)
    return None if name is None else f"{name}:{kind.__qualname__}"


def _takes_none(kind: type[nn.Module]) -> bool:
    """Whether a class builds a whole model without arguments."""
    if missing_arguments(kind, ()):
        return False
    # nn.Sequential takes its parts so; without them it is empty.
    parameters = inspect.signature(kind.__init__).parameters.values()
    has_parts = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return not has_parts or kind.__init__ is nn.Module.__init__


def _importable(module: ModuleType) -> str | None:
    """The name under which a module can be imported from the working directory."""
    main = sys.modules.get("__main__")
    is_main = module is main
    spec = getattr(main, "__spec__", None)
    if is_main and spec is not None:
        return str(spec.name)  # python -m package.module
    script = getattr(main, "__file__", None)
    file = getattr(module, "__file__", None)
    if is_main and file is None:
        return None  # a notebook
    top = sys.modules.get(module.__name__.partition(".")[0], module)
    places = getattr(top, "__path__", None)
    root = Path(next(iter(places))) if places else Path(getattr(top, "__file__", None) or "")
    # Of a script, Python finds the neighbours, wherever it is started.
    is_beside = script is not None and spec is None and root.parent == Path(script).resolve().parent
    if not is_main and not is_beside:
        return module.__name__
    path, here = Path(file or "").resolve(), Path.cwd().resolve()
    if not path.is_relative_to(here) or path.suffix != ".py":
        return None
    name = ".".join(path.relative_to(here).with_suffix("").parts)
    return name if NAME.fullmatch(f"{name}:x") else None


def missing_arguments(build: Callable[..., Any], given: Collection[str]) -> list[str]:
    """Names of the arguments without a default that are not given."""
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in given
    ]


def check_form(text: str) -> None:
    """Raises BuilderError for a text that is not package.module:callable."""
    path, _, name = text.partition(":")
    if NAME.fullmatch(text) and not path.endswith(".py"):
        return
    must = "must be package.module:callable"
    if path.endswith(".py"):
        folder, _, file = path.removeprefix("./").rpartition("/")
        module = file.removesuffix(".py")
        if os.path.isabs(path) or ".." in folder:
            raise BuilderError(f"{must}; type {module}:{name or 'build'} in the folder {folder}")
        package = f"{folder.replace('/', '.')}." if folder else ""
        raise BuilderError(f"{must}; type {package}{module}:{name or 'build'}")
    module, dot, last = text.rpartition(".")
    if dot and ":" not in text and NAME.fullmatch(f"{module}:{last}"):
        raise BuilderError(f"{must}; a colon stands before the name, as in {module}:{last}")
    raise BuilderError(f"{must}, such as train:Net")


def find(text: str) -> Callable[..., Any]:
    """The callable that a name refers to; imports its module.

    Args:
        text: package.module:callable.

    Raises:
        BuilderError: the text is malformed, or there is no such module or callable.
        Exception: whatever the module raises when it is imported.
    """
    check_form(text)
    name, _, path = text.partition(":")
    beside = Path(*name.split(".")[:-1])
    if beside.parts and beside.is_dir() and not (beside / "__init__.py").exists():
        # A script in a folder may import the files beside it.
        sys.path.append(str(beside.resolve()))
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        is_itself = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        if not is_itself:
            raise
        raise BuilderError(_no_module(text, name, str(error.name))) from error
    for part in path.split("."):
        inner = getattr(found, part, None)
        if inner is None:
            known = [n for n in vars(found) if callable(getattr(found, n)) and n[:1] != "_"]
            raise BuilderError(f"{name} has no attribute {part!r}{_nearest(part, known, text)}")
        found = inner
    if not callable(found):
        raise BuilderError(f"is a {type(found).__name__}; must be callable")
    called: Callable[..., Any] = found
    return called


def _no_module(text: str, name: str, missing: str) -> str:
    """What to do about a module that cannot be found."""
    if text == PLACEHOLDER:
        return MEANING
    *folders, last = name.split(".")
    folder = Path(*folders)
    files = [file.stem for file in folder.glob("*.py")] if folder.is_dir() else []
    place = folders[0] if folders else f"{last}.py"
    advice = _nearest(last, files, text) or f"; run the command in the folder of {place}"
    return f"No module named {missing!r} in {Path.cwd()} or among the installed packages{advice}"


def _nearest(word: str, known: Collection[str], text: str) -> str:
    """`; did you mean X?`, or an empty string."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    if not close:
        return ""
    # The last occurrence of a callable, the last of a module's part before the colon.
    module, _, path = text.partition(":")
    right = by_lower[close[0]]
    if word in path.split("."):
        return f"; did you mean {module}:{path.replace(word, right)}?"
    return f"; did you mean {module[: -len(word)]}{right}:{path}?"
