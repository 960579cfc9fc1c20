"""The entry point shared by all commands: quoting, composing, one-line errors, exit codes.

Exit codes: 0 done, 1 failure, 2 bad input, 130 Ctrl-C, 143 terminated.
"""

import io
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from src.cli import interrupt
from src.cli.flags import Flags, read_flags
from src.common import storage, terminal
from src.common.errors import InputError
from src.common.tracking_address import masked, take_typed

if TYPE_CHECKING:
    from src.config.run_config import RunConfig

OK, FAILURE, BAD_INPUT = 0, 1, 2


def main(
    config_name: str,
    command: "Callable[[RunConfig], int]",
    *,
    usage: str,
    sweep: Callable[[str, Sequence[str]], int] | None = None,
    plan: "Callable[[RunConfig], int] | None" = None,
    before_torch: Callable[[Sequence[str]], None] | None = None,
    is_checked: bool = False,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command that composes a run, and returns its exit code.

    Args:
        config_name: its file in conf/.
        command: called with the checked configuration; returns the exit code. It imports what it
            needs itself, so that a mistake is answered before.
        usage: the text of --help.
        sweep: called for --multirun with the config name and the arguments; None: --multirun is an
            error.
        plan: called in place of the command for plan=true; None: the command has no such field.
        before_torch: called with the arguments of a run that is to be trained, after the checks
            that need no PyTorch and before PyTorch is imported; None: nothing is called.
        is_checked: whether a sweep has already made the checks that need no PyTorch.
        argv: arguments; None: those of the process.
    """

    def act(arguments: list[str], flags: Flags) -> int:
        if flags.multirun and flags.cfg is not None:
            raise InputError(
                "--cfg: shows a single run; leave out --multirun, or type plan=true to see all"
            )
        if flags.multirun:
            if sweep is None:
                raise InputError("--multirun: works only with src.train")
            return sweep(config_name, arguments)
        arguments, is_plan = _without_plan(arguments) if plan is not None else (arguments, False)
        if not is_checked:
            check_early(config_name, arguments)
        if before_torch is not None and flags.cfg is None and not is_plan:
            before_torch(arguments)
        config = checked(config_name, arguments)
        if flags.cfg is not None:
            from src.cli.inspect_config import show_run

            return show_run(config)
        interrupt.imports_are_done()
        return plan(config) if is_plan and plan is not None else command(config)

    return _main(config_name, act, usage=usage, argv=argv)


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
        command: called with the values; returns the exit code. It imports what it needs itself, so
            that a mistake is answered before.
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

    def act(arguments: list[str], flags: Flags) -> int:
        from src.cli.hydra_errors import readable
        from src.common.override_grammar import parse_all
        from src.config.hydra_compose import compose_plain

        if flags.multirun:
            raise InputError("--multirun: works only with src.train")
        _check_decoded([f"{field}={text}" for field, text in texts.items()])
        with readable(config_name, arguments):
            for override in parse_all(arguments):
                if override.is_sweep_override():
                    name, _, several = str(override.input_line).partition("=")
                    how = f"; type '{name}=[{several}]'" if name == "studies" else ""
                    raise InputError(f"{override.input_line}: must be a single value{how}")
                if override.key_or_group in verbatim:
                    raise InputError(
                        f"{override.input_line}: type fields as field=value, without + or ~"
                    )
            fields = compose_plain(config_name, arguments) | texts
        if flags.cfg is not None:
            from src.cli.inspect_config import show_fields

            return show_fields(fields)
        interrupt.imports_are_done()
        return command(fields)

    return _main(config_name, act, usage=usage, argv=others)


def _main(
    config_name: str,
    act: Callable[[list[str], Flags], int],
    *,
    usage: str,
    argv: Sequence[str] | None,
) -> int:
    raw = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on standard error: a character that the locale lacks, such as C, must not raise.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        flags = read_flags(raw)
        if flags.cfg not in (None, "job"):
            raise InputError(f"--cfg {flags.cfg}: type --cfg job, which shows the configuration")
        if flags.help:
            terminal.say(usage.strip())
            return OK
        # From here on Hydra is needed, which takes a moment to import.
        from src.cli.name_checks import unknown_flag
        from src.common.override_grammar import join_braces, quote_free_text
        from src.config.hydra_compose import use_config_dir

        _check_decoded(flags.arguments)
        # Before anything else, so that no message and no file repeats the password of an address.
        typed = [take_typed(argument) for argument in flags.arguments]
        if flags.config_dir is not None:
            use_config_dir(flags.config_dir)
        for argument, following in itertools.zip_longest(typed, typed[1:]):
            if argument.startswith("-"):
                raise unknown_flag(config_name, argument, following)
        arguments = [quote_free_text(argument) for argument in join_braces(typed)]
        if flags.completion is not None:
            from src.cli.completion import complete

            return complete(flags.completion, config_name)
        if flags.info:
            from src.cli.inspect_config import show_info

            return show_info()
        return act(arguments, flags)
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


def _without_plan(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without `plan`, and whether it is true.

    Raises:
        InputError: it is neither true nor false.
    """
    others, is_plan = [], False
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "plan":
            others.append(argument)
        elif value.lower() not in ("true", "false"):
            raise InputError(f"{argument}: must be true or false")
        else:
            is_plan = value.lower() == "true"
    return others, is_plan


def check_early(config_name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Raises InputError for a mistake in a name or in a number, at once and without PyTorch.

    Args:
        config_name: the file in conf/ of a command that composes a run.
        arguments: those of one run.

    Returns:
        The composed fields, with values as they are in conf/.
    """
    from src.cli.hydra_errors import readable
    from src.cli.name_checks import check_form, check_names
    from src.cli.value_checks import check_values
    from src.common.override_grammar import parse
    from src.config.fork import with_inherited

    with readable(config_name, arguments):
        check_form(config_name, arguments)
        arguments = with_inherited(parse(arguments), arguments)
        fields = check_names(config_name, arguments)
        check_values(fields, arguments)
    return fields


def checked(config_name: str, arguments: Sequence[str]) -> "RunConfig":
    """Composes the configuration of one run.

    Raises:
        InputError: any mistake in the arguments, including those that Hydra finds.
    """
    from src.cli.hydra_errors import readable
    from src.cli.name_checks import check_form
    from src.config.compose import compose

    with readable(config_name, arguments):
        check_form(config_name, arguments)
        return compose(config_name, arguments)
