"""The way into every command: quoting, composing, errors in one line, exit codes.

Exit codes: 0 done, 1 failure, 2 bad input, 130 Ctrl-C, 143 terminated.
"""

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

from src.cli import interrupt
from src.cli.hydra_errors import GRAMMAR_HINT, readable
from src.common import storage, terminal
from src.common.errors import InputError
from src.common.override_grammar import parse_all, quote_free_text
from src.common.tracking_address import masked, take_typed
from src.config.compose import compose
from src.config.hydra_compose import compose_plain
from src.config.run_config import RunConfig

OK, FAILURE, BAD_INPUT = 0, 1, 2

SWEEP_FIELDS = ("experiment", "n_jobs", "timeout", "share_prefix", "plan")
"""Fields of conf/sweep.yaml, which belong to a sweep and to none of its cells."""


def is_sweep_field(argument: str) -> bool:
    """Whether an argument is for the sweep, or for Hydra's launcher, and not for its cells."""
    key = argument.partition("=")[0].lstrip("+~").strip()
    return key in SWEEP_FIELDS or key.startswith(("hydra/launcher", "hydra.launcher"))


def main(
    config_name: str,
    command: Callable[[RunConfig], int],
    *,
    usage: str,
    sweep: Callable[[str, Sequence[str]], int] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command and returns its exit code.

    Args:
        config_name: its file in conf/.
        command: what to do with a checked configuration.
        usage: the text of --help.
        sweep: what to do with --multirun, given config name and arguments; None: refuse it.
        argv: arguments; None: those of the process.
    """

    def act(arguments: list[str], multirun: bool) -> int:
        if not multirun:
            return command(checked(config_name, arguments))
        if sweep is None:
            raise InputError("--multirun: is for src.train alone")
        return sweep(config_name, arguments)

    return _main(act, usage=usage, argv=argv)


def plain_main(
    config_name: str,
    command: Callable[[dict[str, Any]], int],
    *,
    usage: str,
    verbatim: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """The same for a command whose fields are its own, handed over as plain values.

    Args:
        config_name: its file in conf/.
        command: what to do with the values.
        usage: the text of --help.
        verbatim: fields whose value is text as it was typed, whatever it would mean to Hydra.
        argv: arguments; None: those of the process.
    """
    texts: dict[str, Any] = {}
    others = []
    for argument in sys.argv[1:] if argv is None else argv:
        key, equals, text = argument.partition("=")
        if equals and key in verbatim:
            texts[key] = text
        else:
            others.append(argument)

    def act(arguments: list[str], multirun: bool) -> int:
        if multirun:
            raise InputError("--multirun: is for src.train alone")
        _check_read([f"{field}={text}" for field, text in texts.items()])
        with readable(config_name, arguments):
            for override in parse_all(arguments):
                if override.is_sweep_override():
                    raise InputError(f"{override.input_line}: takes one value here")
                if override.key_or_group in verbatim:
                    raise InputError(
                        f"{override.input_line}: fields are set as field=value, without + and ~"
                    )
            return command(compose_plain(config_name, arguments) | texts)

    return _main(act, usage=usage, argv=others)


def _main(act: Callable[[list[str], bool], int], *, usage: str, argv: Sequence[str] | None) -> int:
    interrupt.imports_are_done()
    raw = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a letter, as in the locale C, gets its code, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    given = [argument for argument in raw if argument not in ("-m", "--multirun")]
    multirun = len(given) < len(raw)
    if any(argument in ("--help", "-h") for argument in given):
        terminal.say(usage.strip())
        return OK
    try:
        _check_read(given)
        # First of all, so that no message and no file repeats what is secret in an address.
        typed = [take_typed(argument) for argument in given]
        flags = [argument for argument in typed if argument.startswith("-")]
        if flags:
            raise InputError(f"{flags[0]}: unknown flag; {GRAMMAR_HINT}")
        arguments = [quote_free_text(argument) for argument in typed]
        return act(arguments, multirun)
    except InputError as error:
        # An address may also stand where none belongs.
        terminal.error(masked(str(error)))
        return BAD_INPUT
    except OSError as error:
        # Of the environment by its kind; what a user can mend is turned into an InputError below.
        terminal.error(masked(storage.trouble(error)))
        return FAILURE


def _check_read(arguments: Sequence[str]) -> None:
    """Raises InputError where Python could not read the bytes of an argument in this locale."""
    for argument in arguments:
        # It puts halves of characters in their place, which nothing can write.
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise InputError(
                f"{ascii(argument)[1:-1]}: holds bytes that are not text in this locale;"
                " LC_ALL=C.UTF-8 reads UTF-8"
            )


def checked(config_name: str, arguments: Sequence[str]) -> RunConfig:
    """`compose`, with every way in which input can be bad turned into an InputError."""
    with readable(config_name, arguments):
        for override in parse_all(arguments):
            if override.is_add() or override.is_force_add() or override.is_delete():
                raise InputError(
                    f"{override.input_line}: fields are set as field=value, without + and ~"
                )
            if is_sweep_field(override.input_line or ""):
                raise InputError(
                    f"{override.input_line}: is a field of sweeps; add --multirun to have one"
                )
            if override.key_or_group.startswith("hydra"):
                raise InputError(f"{override.input_line}: Hydra's own settings are fixed here")
            if override.is_sweep_override():
                raise InputError(
                    f"{override.input_line}: has several values; add --multirun to run each"
                )
        return compose(config_name, arguments)
