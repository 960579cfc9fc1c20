"""The entry point shared by all commands: quoting, composing, one-line errors, exit codes.

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
from src.common.override_grammar import join_braces, parse_all, quote_free_text
from src.common.tracking_address import masked, take_typed
from src.config.compose import compose
from src.config.hydra_compose import compose_plain
from src.config.run_config import RunConfig

OK, FAILURE, BAD_INPUT = 0, 1, 2

SWEEP_FIELDS = ("experiment", "n_jobs", "timeout", "share_prefix", "plan")
"""Fields of conf/sweep.yaml, which belong to a sweep and not to its runs."""


def is_sweep_field(argument: str) -> bool:
    """Whether an argument is for the sweep or its launcher, and not for its runs."""
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
        command: called with the checked configuration; returns the exit code.
        usage: the text of --help.
        sweep: called for --multirun with the config name and the arguments; None: --multirun is an
            error.
        argv: arguments; None: those of the process.
    """

    def act(arguments: list[str], multirun: bool) -> int:
        if not multirun:
            return command(checked(config_name, arguments))
        if sweep is None:
            raise InputError("--multirun: works only with src.train")
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
    """Like `main`, for a command with fields of its own, which it gets as plain values.

    Args:
        config_name: its file in conf/.
        command: called with the values; returns the exit code.
        usage: the text of --help.
        verbatim: fields whose value is taken as typed, without Hydra's grammar.
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
            raise InputError("--multirun: works only with src.train")
        _check_decoded([f"{field}={text}" for field, text in texts.items()])
        with readable(config_name, arguments):
            for override in parse_all(arguments):
                if override.is_sweep_override():
                    raise InputError(f"{override.input_line}: must be a single value")
                if override.key_or_group in verbatim:
                    raise InputError(
                        f"{override.input_line}: type fields as field=value, without + or ~"
                    )
            return command(compose_plain(config_name, arguments) | texts)

    return _main(act, usage=usage, argv=others)


def _main(act: Callable[[list[str], bool], int], *, usage: str, argv: Sequence[str] | None) -> int:
    interrupt.imports_are_done()
    raw = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on standard error: a character that the locale lacks, such as C, must not raise.
        sys.stdout.reconfigure(errors="backslashreplace")
    without_multirun = [argument for argument in raw if argument not in ("-m", "--multirun")]
    multirun = len(without_multirun) < len(raw)
    if any(argument in ("--help", "-h") for argument in without_multirun):
        terminal.say(usage.strip())
        return OK
    try:
        _check_decoded(without_multirun)
        # Before anything else, so that no message and no file repeats the password of an address.
        typed = [take_typed(argument) for argument in without_multirun]
        flags = [argument for argument in typed if argument.startswith("-")]
        if flags:
            raise InputError(f"{flags[0]}: unknown flag; {GRAMMAR_HINT}")
        arguments = [quote_free_text(argument) for argument in join_braces(typed)]
        return act(arguments, multirun)
    except InputError as error:
        # Masked, because an address may have been typed for any field.
        terminal.error(masked(str(error)))
        return BAD_INPUT
    except OSError as error:
        # Trouble of the machine, such as a full disk. Errors that a user can correct by typing
        # something else are InputErrors by now.
        terminal.error(masked(storage.trouble(error)))
        return FAILURE


def _check_decoded(arguments: Sequence[str]) -> None:
    """Raises InputError if Python could not decode an argument in this locale."""
    for argument in arguments:
        # Python replaces such bytes by lone surrogates, which cannot be written anywhere.
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise InputError(
                f"{ascii(argument)[1:-1]}: contains bytes that are not text in this locale; if they"
                " are UTF-8, set LC_ALL=C.UTF-8"
            )


def checked(config_name: str, arguments: Sequence[str]) -> RunConfig:
    """Composes the configuration of one run.

    Raises:
        InputError: any mistake in the arguments, including those that Hydra finds.
    """
    with readable(config_name, arguments):
        for override in parse_all(arguments):
            if override.is_add() or override.is_force_add() or override.is_delete():
                raise InputError(
                    f"{override.input_line}: type fields as field=value, without + or ~"
                )
            if is_sweep_field(override.input_line or ""):
                raise InputError(
                    f"{override.input_line}: is a field of sweeps; add --multirun to start one"
                )
            if override.key_or_group.startswith("hydra"):
                raise InputError(f"{override.input_line}: Hydra's own settings cannot be changed")
            if override.is_sweep_override():
                raise InputError(
                    f"{override.input_line}: has several values; add --multirun to run each"
                )
        return compose(config_name, arguments)
